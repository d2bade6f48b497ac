"""Chat messages, and the templates that render them to a prompt."""
