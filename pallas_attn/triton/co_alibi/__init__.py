"""Co-ALiBi: a scan along the keys, with its own forward and backward kernels."""
