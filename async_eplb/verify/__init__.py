"""Verification that each slot holds the expert in the map: canaries, checksums, audits."""
