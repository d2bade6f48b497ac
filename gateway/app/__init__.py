"""The application: every room's routes put together, and what wraps them. Nothing in the gateway imports from here."""
