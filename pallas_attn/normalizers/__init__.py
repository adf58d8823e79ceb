"""How scores become weights."""
