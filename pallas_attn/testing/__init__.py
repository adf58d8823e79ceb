"""What the tests and tools share."""
