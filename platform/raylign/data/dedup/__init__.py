"""Documents, lines and passages that occur more than once."""
