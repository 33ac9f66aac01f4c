"""Tasks: what they are (spec), where they are read from, and how they become batches."""
