"""What runs and comparisons leave, on disk. Imports no torch."""
