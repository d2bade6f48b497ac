"""OpenAI's completions, chat completions and jobs."""
