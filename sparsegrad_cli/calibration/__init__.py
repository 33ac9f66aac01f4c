"""Gradient steps without updates, from which bases and supports are made."""
