"""Loads models from files: checkpoints, memory maps, GGUF."""
