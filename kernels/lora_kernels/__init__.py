"""LoRA and paged attention for steps of mixed-adapter batches. Knows slots and blocks, no requests, names or models."""
