"""Calibration: compute bases and supports from gradients, without updating the model."""
