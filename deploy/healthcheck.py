"""Report to a container engine whether the service in this container works: exit code 0 if so.

A gateway is healthy if it can answer, a store if it serves blobs, a worker while its heartbeat is in the queue (so only
once its model is loaded), a scheduler while there is a leader.
"""

import asyncio
import os
import socket
import sys
import urllib.request

from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings

TIMEOUT_S = 3


def http_answers(port: int) -> bool:
    """Return whether `/health` on this machine answers 200; raises OSError if it fails."""
    return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=TIMEOUT_S).status == 200


async def queue_knows(service: str) -> bool:
    """Return whether there is a leader, or a recent heartbeat of a worker on this host; raises the queue's errors."""
    bus = Bus(Settings(redis_url=os.environ["REDIS_URL"]).queue_url())
    try:
        async with asyncio.timeout(TIMEOUT_S):
            if service == "scheduler":
                return await bus.has_leader()
            here = socket.gethostname() + "-"
            beats = (await bus.members.worker_beats()).values()
            return any(beat is not None and beat.name.startswith(here) for beat in beats)
    finally:
        await bus.close()


def main(service: str) -> int:
    """Return the exit code for a service: 0 if it is healthy."""
    if service == "gateway":
        return not http_answers(8000)
    if service == "store":
        return not http_answers(int(os.environ["LORAFLEET_STORE_PORT"]))
    return not asyncio.run(queue_knows(service))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
