"""Anthropic's Messages API, on the base model and its adapters."""
