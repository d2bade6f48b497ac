"""The gateway: HTTP in, answers out. Each choice of a call becomes one request on the queue."""
