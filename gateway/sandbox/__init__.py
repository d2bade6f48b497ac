"""Processes that run what strangers wrote, and whose turn it is."""
