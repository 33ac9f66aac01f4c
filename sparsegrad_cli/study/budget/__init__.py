"""Budgets of a comparison: the size at which each method takes the same."""
