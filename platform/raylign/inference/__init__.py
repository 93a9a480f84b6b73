"""Sampling from and scoring with a policy."""
