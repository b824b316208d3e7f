"""Structured log events: their schema, emission, and observers such as metrics and traces."""
