"""The adapters of a worker: fetched, packed, and stored in host memory and in the pool."""
