"""Encoders: whole texts in, vectors or labels out."""
