"""Fair comparison: the grid of cells, its ledger, statistics."""
