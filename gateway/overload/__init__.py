"""What keeps a gateway alive under too much load: admission of calls, and a heartbeat that is never late."""
