"""Random whole calls against a float64 truth that shares no code with the library."""
