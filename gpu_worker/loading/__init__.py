"""From the files of a model to its modules: checkpoints, memory maps, GGUF."""
