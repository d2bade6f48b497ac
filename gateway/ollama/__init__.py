"""Ollama's API, with base models and adapters as its models."""
