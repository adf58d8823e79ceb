"""What layers of any library of modules share: caches, masks, tables of positions."""
