"""The callers of requests: API keys, scopes, and tenants' limits."""
