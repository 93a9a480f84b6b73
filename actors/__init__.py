"""Actors host: each wraps a plain object of `raylign` and adds identity, health and messages."""
