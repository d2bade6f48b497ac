"""OpenAI's Responses and Conversations APIs, on base models and adapters."""
