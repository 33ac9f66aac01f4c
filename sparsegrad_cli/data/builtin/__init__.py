"""Tasks that are generated: they need neither files nor a network."""
