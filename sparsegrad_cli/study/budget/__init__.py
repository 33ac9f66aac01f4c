"""Solve the budget of a comparison: find the size at which each method fits it."""
