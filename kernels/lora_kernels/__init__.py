"""LoRA and paged attention for steps of mixed-adapter batches. Knows slots and blocks, but no requests or models."""
