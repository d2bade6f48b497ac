"""What consumer groups would cost the work streams, which have one reader each: server CPU and memory per message.

python -m benchmarks.fleet.queue_groups [--messages 50000]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import redis

from lorafleet.launcher.embedded import start_embedded

PAYLOAD = b"x" * 250  # about a submit message


def cpu_s(client: redis.Redis) -> float:
    """Return the CPU seconds that the server has used."""
    info = client.info("cpu")
    return info["used_cpu_user"] + info["used_cpu_sys"]


def fill(client: redis.Redis, num: int) -> None:
    """Add `num` entries to the stream."""
    for start in range(0, num, 100):
        pipe = client.pipeline(transaction=False)
        for _ in range(min(100, num - start)):
            pipe.xadd("s", {"b": PAYLOAD})
        pipe.execute()


def with_group(client: redis.Redis, num: int) -> tuple[float, float]:
    """Return (us of server CPU, bytes held while unfinished) per message read by XREADGROUP, ended by XACK + XDEL."""
    client.xgroup_create("s", "g", id="0", mkstream=True)
    fill(client, num)
    before, memory = cpu_s(client), client.info("memory")["used_memory"]
    ids = []
    while batch := client.xreadgroup("g", "c", {"s": ">"}, count=64):
        ids += [entry[0] for entry in entries_of(batch)]
    held = client.info("memory")["used_memory"] - memory
    for start in range(0, num, 64):
        client.xack("s", "g", *ids[start : start + 64])
        client.xdel("s", *ids[start : start + 64])
    return (cpu_s(client) - before) / num * 1e6, held / num


def without_group(client: redis.Redis, num: int) -> tuple[float, float]:
    """Do the same for XREAD from the last id seen, ended by XDEL."""
    fill(client, num)
    before, memory = cpu_s(client), client.info("memory")["used_memory"]
    ids, last = [], b"0"
    while batch := client.xread({"s": last}, count=64):
        ids += [entry[0] for entry in entries_of(batch)]
        last = ids[-1]
    held = client.info("memory")["used_memory"] - memory
    for start in range(0, num, 64):
        client.xdel("s", *ids[start : start + 64])
    return (cpu_s(client) - before) / num * 1e6, held / num


def entries_of(reply: Any) -> list[Any]:
    """Return the entries of a reply for one stream."""
    found = next(iter(reply.values())) if isinstance(reply, dict) else reply[0][1]
    return found[0] if found and isinstance(found[0], list) else found


def main() -> None:
    """Measure both ways on a queue server of their own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=50_000)
    num = parser.parse_args().messages
    with tempfile.TemporaryDirectory() as folder:
        server = start_embedded(Path(folder), durable=False)
        client = redis.Redis(unix_socket_path=str(server.socket))
        for name, measure in (("group", with_group), ("no group", without_group)) * 2:
            client.flushall()
            cpu_us, held = measure(client, num)
            print(f"{name:9} {cpu_us:6.2f} us of server CPU per message, {held:6.0f} bytes held while unfinished")
        server.stop()


if __name__ == "__main__":
    main()
