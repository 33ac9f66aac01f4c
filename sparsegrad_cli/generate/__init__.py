"""Generate answers of a language model: to one prompt, a file of questions, or in a chat."""
