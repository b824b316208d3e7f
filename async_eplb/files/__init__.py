"""Files of serving engines and of this package, read as tables of numbers. Nothing in a file is run."""
