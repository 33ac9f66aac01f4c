"""Memory: measure it by phase and category, and explain why it ran out."""
