"""Adapters whose tensors are named otherwise than the base model's modules: mapped exactly, or refused."""
