"""Loads: tokens of each logical expert, counted on the device while the model serves, and summed over ranks."""
