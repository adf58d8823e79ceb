"""What tiled lowerings share, and what one must bring: it names no backend."""
