"""Scripts without this package, as a good user writes them, to which whole_job.py compares it."""
