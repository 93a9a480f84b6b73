"""Language models: shapes, loading and saving, token log-probabilities."""
