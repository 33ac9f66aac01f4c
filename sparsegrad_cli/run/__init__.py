"""Check, lock, record, resume and report a run in its folder. Imports no torch."""
