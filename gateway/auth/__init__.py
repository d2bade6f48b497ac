"""Who sends a request: API keys, scopes, and the limits of tenants."""
