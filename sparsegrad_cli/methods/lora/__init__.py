"""LoRA, by the peft library."""
