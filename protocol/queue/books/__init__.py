"""A fleet's accounting in the queue: API keys, quotas, usage, and the audit log."""
