"""Batches: files of calls that run when the fleet has free slots, as in OpenAI's API."""
