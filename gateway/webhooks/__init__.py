"""Webhooks: a POST, in OpenAI's form, notifies clients of the end of their jobs and batches."""
