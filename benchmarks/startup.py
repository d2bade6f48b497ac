"""How long `lorafleet up MODEL` takes until it answers, and what its processes spend until then.

    python -m benchmarks.startup MODEL [--rounds 3]

The first start, which may make caches, is not counted. Seconds until the gateway reports a worker, medians of rounds;
CPU seconds of each process until then; and what the worker says of its own loading, imports not included.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from pathlib import Path

import psutil

from benchmarks.common import report
from benchmarks.common.fleet import scratch_folder
from benchmarks.peers.servers import PORT, Server, running

LOADED = re.compile(r"ready in ([\d.]+) s")


def service_of(process: psutil.Process) -> str:
    """Return what a process of the fleet is: a service, the queue's server, or the launcher."""
    words = process.cmdline()
    if "serve" in words:
        return words[words.index("serve") + 1]
    return "launcher" if "up" in words else Path(words[0]).name if words else "?"


def start(model: str, scratch: Path) -> dict[str, float]:
    """Start a fleet and stop it. Returns seconds by stage."""
    command = [sys.executable, "-m", "lorafleet", "up", model, "--host", "127.0.0.1", "--port", PORT]
    command += ["--data", str(scratch / "data")]
    began = time.monotonic()
    with running(Server("fleet", command, {}), scratch / "up.log"):
        found = {"ready": time.monotonic() - began}
        processes = [child for child in psutil.Process().children(recursive=True) if child.is_running()]
        for process in processes:
            name = f"CPU of {service_of(process)}"
            used = process.cpu_times()
            found[name] = found.get(name, 0.0) + used.user + used.system
        (log,) = scratch.glob("data/logs/*/worker-0.log")
        if match := LOADED.search(log.read_text()):
            found["loading, of the worker's time"] = float(match[1])
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what `lorafleet up` is given")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with scratch_folder() as scratch:
        start(args.model, scratch)
        rounds = [start(args.model, scratch) for _ in range(args.rounds)]
    rows = [(name, f"{statistics.median(one.get(name, 0.0) for one in rounds):.2f}") for name in rounds[0]]
    print(report.table(("stage", "s"), rows))


if __name__ == "__main__":
    main()
