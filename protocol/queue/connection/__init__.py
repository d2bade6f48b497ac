"""Access to the server: clients, the shared line for scripts, and failover."""
