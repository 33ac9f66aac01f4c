"""MeProp: the largest entries of a gradient, by parameter or by output row."""
