"""Sends answers to clients: keeps the connection alive until they begin, then sends them whole or as a stream."""
