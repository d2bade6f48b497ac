"""The books of a fleet in the queue: API keys, quotas, usage, and the audit log of what operators did."""
