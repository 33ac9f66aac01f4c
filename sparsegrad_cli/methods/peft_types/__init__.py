"""Every PEFT type as a method, by the peft library."""
