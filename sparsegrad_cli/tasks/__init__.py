"""What a recipe trains on and how it is judged: data, tokenizer and model, loaded together."""
