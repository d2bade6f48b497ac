"""Batches: files of calls that are run when the fleet has places left, as OpenAI's API has them."""
