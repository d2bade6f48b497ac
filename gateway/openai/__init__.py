"""OpenAI's HTTP bodies."""
