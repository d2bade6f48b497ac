"""CUDA graphs, warm-up and memory measurement on GPUs."""
