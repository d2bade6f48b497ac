"""The asyncio side of a worker: its process, and its work for the queue."""
