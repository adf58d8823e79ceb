"""Entmax through lists of keys: top-k, and short supports."""
