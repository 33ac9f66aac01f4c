"""Calibration, the Trainer (transformers.Trainer underneath), checkpoints, callbacks."""
