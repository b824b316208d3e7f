"""One order on all ranks: which layers are committed and launched, and at which step boundary."""
