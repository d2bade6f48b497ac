"""Adapters in a worker: fetched, packed, kept in host memory and in the pool."""
