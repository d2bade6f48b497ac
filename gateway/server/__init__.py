"""The HTTP server: uvicorn's, with limits on connections, heads and bodies."""
