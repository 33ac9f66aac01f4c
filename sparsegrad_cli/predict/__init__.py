"""Label new texts with a trained classifier."""
