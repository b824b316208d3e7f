"""One update: three stages overlap over the stream of layers, from its admission to how it ended."""
