"""Embeddings, labels of tokens and texts, and scores of pairs."""
