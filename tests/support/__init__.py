"""Fixtures, tiny models and generators of inputs that several tests share."""
