"""A run's folder: checked, locked, recorded, resumed and reported. Imports no torch."""
