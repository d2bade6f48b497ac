"""LoRA and paged-attention operations for one step of mixed-adapter batches. Knows no requests, names or models."""
