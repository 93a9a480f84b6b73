"""Raylign: from raw text to an aligned, measured assistant, distributed on Ray."""

__version__ = "0.1.0"
