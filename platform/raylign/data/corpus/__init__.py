"""The pipeline on Ray Data: parts that are whole or absent, and the passes over them."""
