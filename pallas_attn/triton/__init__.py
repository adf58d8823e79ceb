"""Tiled passes, lowered to Triton."""
