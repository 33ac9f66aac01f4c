"""SparseGrad: the core form, and the two forms of the paper."""
