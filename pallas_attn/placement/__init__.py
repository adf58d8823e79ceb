"""Where a call runs: compiled once for equal calls, on one device or over a mesh."""
