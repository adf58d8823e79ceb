"""What JAX is told of a function that it traces: names, derivatives, mesh axes."""
