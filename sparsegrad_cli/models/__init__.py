"""Models and tokenizers, and where their MLP layers are."""
