"""Evaluation items, found in and taken out of documents."""
