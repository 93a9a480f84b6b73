"""Training, loading and comparing tokenizers."""
