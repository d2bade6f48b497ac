"""Webhooks: clients are told by a POST that their jobs and batches have ended, in OpenAI's form."""
