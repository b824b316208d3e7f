"""Proof that a slot holds the expert that the map says: canaries, checksums, audits."""
