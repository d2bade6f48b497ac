"""Bases whose weights stay quantized in memory: GGUF files, and folders quantized by the worker."""
