"""What a run or another library has trained, put back onto its base model."""
