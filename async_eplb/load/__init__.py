"""Loads: what experts are given, as values, counted on the device while serving, and summed over ranks."""
