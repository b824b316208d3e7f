"""A small server of a small Mixture-of-Experts model, whose experts move while it answers.

Data-parallel attention, expert-parallel feed-forward layers, continuous batching, an HTTP front that streams tokens.
It is here to be read and to be tested against: its logits are the same bits whatever the placement, the batch, and
the moves that go on meanwhile.
"""
