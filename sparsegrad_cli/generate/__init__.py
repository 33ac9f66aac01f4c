"""Answers of a trained language model: to one prompt, to a file of questions, in conversation."""
