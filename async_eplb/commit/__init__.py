"""Staging buffers to live weights, and publishing: what of an update writes what the model reads."""
