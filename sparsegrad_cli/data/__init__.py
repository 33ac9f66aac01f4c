"""Read the data of a task, and turn it into token ids and batches."""
