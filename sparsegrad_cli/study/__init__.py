"""Run a study, tune its methods, check that they are comparable, and compute statistics."""
