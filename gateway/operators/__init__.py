"""What operators do beside adapters: workers, dead letters, API keys and tenants."""
