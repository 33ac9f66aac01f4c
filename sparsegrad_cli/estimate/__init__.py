"""Estimate the memory of a training step by running it on tensors without memory."""
