"""Load models and tokenizers, and find the MLP layers of a model."""
