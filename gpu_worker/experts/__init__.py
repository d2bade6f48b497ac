"""LoRA on the experts of a mixture: their rows in the adapter pool, and the modules that add it between products."""
