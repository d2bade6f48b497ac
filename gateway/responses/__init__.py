"""OpenAI's Responses API, on the base model and its adapters."""
