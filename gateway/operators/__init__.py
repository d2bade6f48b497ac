"""Routes of operators: adapters, workers, bases, dead letters, API keys and tenants."""
