"""Turns an adapter's files, or several adapters, into what the pool holds."""
