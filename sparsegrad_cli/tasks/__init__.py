"""Tasks: load data, tokenizer and model together, and evaluate the model."""
