"""The gateway: an HTTP server that submits each choice of a call as a request to the queue."""
