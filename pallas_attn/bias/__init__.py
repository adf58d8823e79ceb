"""Terms added to the scores."""
