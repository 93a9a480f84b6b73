"""What a completion is worth: verifiers, user functions, their parts and their shaping."""
