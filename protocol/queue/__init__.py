"""The queue: the only code that talks to Redis."""
