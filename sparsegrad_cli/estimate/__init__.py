"""What a training step will need, found out by running it on tensors without memory."""
