"""Processes that run untrusted templates and grammars, and the order of their jobs."""
