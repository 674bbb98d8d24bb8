"""Why is it fast and small? The cache, the low-rank gradients, the checkpointing."""
