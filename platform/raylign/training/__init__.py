"""Gradients and optimizer steps, on one process or on many."""
