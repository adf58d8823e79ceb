"""The specification, dense."""
