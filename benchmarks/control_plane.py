"""What the control plane alone can carry: gateway, scheduler and queue around workers without a model.

    python -m benchmarks.control_plane --model FOLDER [--out benchmarks/results/control_plane.json]

FOLDER needs a tokenizer only. The client reads sockets and counts events, so that it costs little beside the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from lorafleet.embedded import start_embedded
from protocol.bus import Bus
from protocol.settings import Settings


@dataclass
class Fleet:
    """The processes measured."""

    url_port: int
    processes: dict[str, subprocess.Popen[bytes]]
    queue_pid: int

    def cpu_s(self) -> dict[str, float]:
        """Return CPU seconds used so far, by process."""
        pids = {name: process.pid for name, process in self.processes.items()} | {"queue": self.queue_pid}
        return {name: sum(psutil.Process(pid).cpu_times()[:2]) for name, pid in pids.items()}


@dataclass
class Stream(asyncio.Protocol):
    """One streamed completion: sends the request, counts the events that come back."""

    request: bytes
    done: asyncio.Future[None]
    started_s: float = 0.0
    first_s: float = 0.0
    num_events: int = 0
    failed: str = ""
    _transport: Any = None
    _tail: bytes = field(default=b"", repr=False)

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self.started_s = time.perf_counter()
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        if not self.num_events and not self._tail and not data.startswith(b"HTTP/1.1 200"):
            self.failed = data[:200].decode(errors="replace")
        buffer = self._tail + data
        events = buffer.count(b"data: ")
        if events and not self.num_events:
            self.first_s = time.perf_counter()
        self.num_events += events
        self._tail = buffer[-5:] if not buffer.endswith(b"\n") else b"\n"
        if b"[DONE]" in buffer or self.failed:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


async def load(port: int, *, num: int, concurrency: int, tokens: int) -> list[Stream]:
    """Ask for `num` completions of `tokens` tokens, `concurrency` at a time."""
    loop = asyncio.get_running_loop()
    body = json.dumps(
        {"model": "base", "prompt": [7] * 64, "max_tokens": tokens, "stream": True, "ignore_eos": True}
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    request = head.encode() + b"\r\nConnection: close\r\n\r\n" + body
    room = asyncio.Semaphore(concurrency)

    async def one() -> Stream:
        async with room:
            stream = Stream(request, loop.create_future())
            await loop.create_connection(lambda: stream, "127.0.0.1", port)
            await stream.done
            return stream

    return await asyncio.gather(*(one() for _ in range(num)))


async def measure(fleet: Fleet, name: str, *, num: int, concurrency: int, tokens: int) -> dict[str, Any]:
    """Run one load and return its figures."""
    before, started = fleet.cpu_s(), time.perf_counter()
    streams = await load(fleet.url_port, num=num, concurrency=concurrency, tokens=tokens)
    wall_s = time.perf_counter() - started
    after = fleet.cpu_s()
    failed = [stream.failed for stream in streams if stream.failed]
    if failed:
        raise RuntimeError(f"{len(failed)} of {num} requests failed: {failed[0]}")
    total = num * tokens
    ttft_ms = np.array([(stream.first_s - stream.started_s) * 1e3 for stream in streams])
    result = {
        "name": name, "requests": num, "concurrency": concurrency, "tokens": tokens, "wall_s": round(wall_s, 2),
        "tok_s": round(total / wall_s), "req_s": round(num / wall_s, 1),
        "ttft_ms": {f"p{p}": round(float(np.percentile(ttft_ms, p)), 2) for p in (50, 90, 99)},
        "cpu_us_per_token": {key: round((after[key] - before[key]) / total * 1e6, 2) for key in after},
    }  # fmt: skip
    print(json.dumps(result), flush=True)
    return result


def start(folder: Path, model: Path, *, workers: int, step_ms: float, capacity: int) -> tuple[Fleet, Any]:
    """Start queue, scheduler, gateway and `workers` fake workers in one process; wait for health."""
    queue = start_embedded(folder / "queue")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = Settings(redis_url=queue.url, model=str(model), data=folder, port=port, log_level="warning")
    environment = os.environ | settings.environment()
    commands = {
        "scheduler": ["-m", "lorafleet", "serve", "scheduler"],
        "gateway": ["-m", "lorafleet", "serve", "gateway"],
        "workers": ["-m", "benchmarks.fake_worker", f"--count={workers}", f"--step-ms={step_ms}",
                    f"--capacity={capacity}", "--vocab-size=40000"],
    }  # fmt: skip
    processes = {
        name: subprocess.Popen([sys.executable, *args], env=environment, stdin=subprocess.DEVNULL)
        for name, args in commands.items()
    }
    return Fleet(port, processes, queue.process.pid), queue


async def run(model: Path, *, workers: int, step_ms: float, capacity: int, loads: list[dict[str, Any]]) -> list[Any]:
    """Measure `loads` on a fresh fleet."""
    with tempfile.TemporaryDirectory() as folder:
        fleet, queue = start(Path(folder), model, workers=workers, step_ms=step_ms, capacity=capacity)
        try:
            await _ready(queue.url, fleet, workers)
            await load(fleet.url_port, num=16, concurrency=8, tokens=2)
            results = [await measure(fleet, **one) for one in loads]
        finally:
            for process in fleet.processes.values():
                process.terminate()
            for process in fleet.processes.values():
                process.wait()
            queue.stop()
    return [{"workers": workers, "step_ms": step_ms, **result} for result in results]


async def _ready(queue_url: str, fleet: Fleet, workers: int) -> None:
    bus = Bus(queue_url)
    while len(await bus.members(bus.keys.workers)) < workers or not await _listens(fleet.url_port):
        if any(process.poll() is not None for process in fleet.processes.values()):
            raise RuntimeError("a service ended while starting")
        await asyncio.sleep(0.1)
    await asyncio.sleep(1.0)  # the scheduler has seen every beat
    await bus.close()


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


async def everything(model: Path) -> list[Any]:
    idle = {"name": "idle: one request at a time", "num": 200, "concurrency": 1, "tokens": 1}
    short = {"name": "short requests", "num": 3000, "concurrency": 64, "tokens": 1}
    streams = {"name": "256 streams", "num": 512, "concurrency": 256, "tokens": 200}
    full = {"name": "640 streams", "num": 1280, "concurrency": 640, "tokens": 200}
    results = await run(model, workers=1, step_ms=0.5, capacity=256, loads=[idle, short])
    results += await run(model, workers=2, step_ms=25, capacity=128, loads=[streams])
    results += await run(model, workers=2, step_ms=25, capacity=320, loads=[full])
    for workers in (1, 4, 16):
        scale = {"name": "scaling", "num": 24 * workers, "concurrency": 8 * workers, "tokens": 160}
        results += await run(model, workers=workers, step_ms=25, capacity=8, loads=[scale])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/control_plane.json"))
    args = parser.parse_args()
    results = asyncio.run(everything(args.model))
    about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "cores": os.cpu_count(),
             "machine": platform.processor() or platform.machine()}  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    one, many = (next(r for r in results if r["name"] == "scaling" and r["workers"] == n) for n in (1, 16))
    print(f"16 workers carry {many['tok_s'] / one['tok_s']:.1f} times what one does")


if __name__ == "__main__":
    main()
