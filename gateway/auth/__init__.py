"""The callers of requests: API keys, scopes, and the limits of tenants."""
