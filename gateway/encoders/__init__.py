"""Embeddings and labels of tokens."""
