"""What happened, as structured events: their schema, how they are emitted, and what listens to them."""
