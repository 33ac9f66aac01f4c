"""Typed recipes: schema, loading, overrides, errors with file and line. Imports no torch."""
