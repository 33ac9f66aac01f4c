"""Full fine-tuning of the target modules."""
