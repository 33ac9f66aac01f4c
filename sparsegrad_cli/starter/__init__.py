"""Look at data files, and write a first recipe for them."""
