"""Ollama's API, with the base model and its adapters as models."""
