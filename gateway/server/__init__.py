"""The HTTP server: uvicorn's, with limits on connections, request heads and bodies."""
