"""Files: atomic writes, locks, JSON lines, paths. Imports no torch."""
