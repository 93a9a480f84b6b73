"""How good a model is, and a page that shows how it came to be."""
