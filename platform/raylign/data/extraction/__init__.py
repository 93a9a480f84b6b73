"""From what was found to plain, uniform text."""
