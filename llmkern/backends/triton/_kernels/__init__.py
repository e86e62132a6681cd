"""Device code, one module per kernel family; importing any of it imports Triton."""
