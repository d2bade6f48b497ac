"""Adapters in a worker: fetched, packed, stored in host memory and in the pool."""
