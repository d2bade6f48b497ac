"""Adapters by name: what a name stands for, and the life of an adapter."""
