"""The asyncio side of a worker."""
