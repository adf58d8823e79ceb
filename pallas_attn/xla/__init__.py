"""Chunked attention in plain JAX."""
