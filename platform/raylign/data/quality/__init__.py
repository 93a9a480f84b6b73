"""What is measured of a document, and the rules that judge it."""
