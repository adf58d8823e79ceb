"""Alpha-entmax and top-k: threshold, then passes over the blocks that have weight."""
