"""Staging buffers to live weights: the only code that writes what the model reads while it serves."""
