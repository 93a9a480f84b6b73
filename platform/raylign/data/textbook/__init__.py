"""A generated arithmetic textbook, its exercises and held-out problems."""
