"""Anthropic's Messages API, on base models and adapters."""
