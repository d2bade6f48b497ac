"""Webhooks: POST requests, in OpenAI's format, that notify clients of the end of their jobs and batches."""
