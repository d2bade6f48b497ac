"""Tell a container engine whether the service in this container does its work: exit code 0 if so.

The gateway is healthy when it can answer, the store when it serves blobs, a worker while its beat is on the queue (so
not before its model is loaded), the scheduler while somebody leads.
"""

import os
import socket
import sys
import urllib.request

import redis

from protocol.queue.bus import decode
from protocol.wire.keys import Keys
from protocol.wire.messages import WorkerBeat

TIMEOUT_S = 3


def http_answers(port: int) -> bool:
    """Tell whether `/health` on this machine is 200; raises OSError when it isn't."""
    return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=TIMEOUT_S).status == 200


def worker_beats(client: redis.Redis, keys: Keys) -> bool:
    """Tell whether a worker of this host has beaten lately."""
    here = socket.gethostname() + "-"
    wids = [wid.decode() for wid in client.zrange(keys.workers, 0, -1)]
    raws = client.mget([keys.worker_beat(wid) for wid in wids]) if wids else []
    return any(raw and decode(raw, WorkerBeat).name.startswith(here) for raw in raws)


def main(service: str) -> int:
    """Return the exit code for a service."""
    if service == "gateway":
        return not http_answers(8000)
    if service == "store":
        return not http_answers(int(os.environ["LORAFLEET_STORE_PORT"]))
    keys = Keys()
    with redis.Redis.from_url(os.environ["REDIS_URL"], socket_timeout=TIMEOUT_S) as client:
        if service == "scheduler":
            return not client.exists(keys.leader)
        return not worker_beats(client, keys)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
