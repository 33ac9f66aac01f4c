"""Mathematics on tensors: bases, supports, updates. torch only: no I/O, no logging, no recipe."""
