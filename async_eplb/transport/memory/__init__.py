"""The transport between ranks of one process, with seeded delays and faults."""
