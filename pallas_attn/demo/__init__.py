"""A tour: check every bias, train a small model, see it extrapolate."""
