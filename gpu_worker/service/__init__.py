"""The asyncio side of a worker, and the thread that runs its engine."""
