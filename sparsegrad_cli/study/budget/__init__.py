"""Budgets of a comparison: what each method's size has to be, so that all spend the same."""
