"""Load the trained parameters of a run or of another library into its base model."""
