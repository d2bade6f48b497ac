"""LoRAX's native HTTP API."""
