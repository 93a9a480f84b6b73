"""Documents to packed token rows: the mixture, the tokens, the shards."""
