"""The capacity of the control plane alone: gateway, scheduler and queue with workers that have no model.

    python -m benchmarks.fleet.control_plane --observed SHARE [--rounds N]     # the cost of metrics and tracing
    python -m benchmarks.fleet.control_plane --before CHECKOUT --together [--rounds N]    # CPU of two checkouts
    python -m benchmarks.fleet.control_plane [--model FOLDER] [--before CHECKOUT] [--rounds N] [--short]

FOLDER needs only a tokenizer. `--before` also measures the services of another checkout in the same run: each load runs
on both, with the same client and engine. The order alternates from round to round, and the table has the medians of the
rounds. The client only reads sockets and counts events, so it costs little compared with the server; its own CPU time
is reported. With `--together`, both checkouts get the same load at the same time, so that other load on the machine
affects both alike, and only their CPU time is compared.
"""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
import uvloop

from benchmarks.common import report
from benchmarks.common.fleet import quickstart_model, scratch_folder
from lorafleet.launcher.embedded import start_embedded
from lorafleet.launcher.machine import claim_port
from protocol.queue.bus import Bus
from protocol.runtime.environment import child_environment
from protocol.runtime.settings import Settings

HERE = Path(__file__).resolve().parents[2]
LOAD_S = 120.0  # a longer load has failed
TARGETS = {
    "ttft_ms": ("TTFT idle, p50", "ms", 5.0, min),
    "req_s": ("1-token requests", "req/s", 500.0, max),
    "tok_s": ("800 streams", "tok/s", 20_000.0, max),
    "queue_us": ("queue CPU per token, 256 streams", "µs", 8.0, min),
    "scaling": ("16 workers ÷ 1", "×", 15.0, max),
}
"""Figure -> its title, its unit, its target, and whether lower (min) or higher (max) is better."""


@dataclass
class Processes:
    """The processes of the control plane."""

    url_port: int
    processes: dict[str, subprocess.Popen[bytes]]
    queue_pid: int

    def cpu_s(self) -> dict[str, float]:
        """Return the CPU seconds used so far by each process and by the client."""
        pids = {name: process.pid for name, process in self.processes.items()} | {"queue": self.queue_pid}
        used = {name: sum(psutil.Process(pid).cpu_times()[:2]) for name, pid in pids.items()}
        return used | {"client": time.process_time()}


@dataclass
class Stream(asyncio.Protocol):
    """A streamed completion: sends the request and counts the events of the answer."""

    request: bytes
    done: asyncio.Future[None]
    started_s: float = 0.0
    first_s: float = 0.0
    num_events: int = 0
    failed: str = ""
    _transport: Any = None
    _tail: bytes = field(default=b"", repr=False)

    def connection_made(self, transport: Any) -> None:
        """Send the request."""
        self._transport = transport
        self.started_s = time.perf_counter()
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        """Count events; close the connection after the last one, or after an error."""
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
        """Resolve `done`."""
        if not self.done.done():
            self.done.set_result(None)


async def load(port: int, *, num: int, concurrency: int, tokens: int) -> list[Stream]:
    """Request `num` completions of `tokens` tokens, `concurrency` at a time; return their streams."""
    loop = asyncio.get_running_loop()
    body = json.dumps(
        {"model": "base", "prompt": [7] * 64, "max_tokens": tokens, "stream": True, "ignore_eos": True}
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    request = head.encode() + b"Content-Type: application/json\r\nConnection: close\r\n\r\n" + body
    room = asyncio.Semaphore(concurrency)

    async def one() -> Stream:
        async with room:
            stream = Stream(request, loop.create_future())
            await loop.create_connection(lambda: stream, "127.0.0.1", port)
            await stream.done
            return stream

    return await asyncio.gather(*(one() for _ in range(num)))


async def measure(fleet: Processes, name: str, *, num: int, concurrency: int, tokens: int) -> dict[str, Any]:
    """Run one load and return its figures. Raises RuntimeError if a request fails."""
    gc.collect()
    gc.disable()  # it would scan the objects of all earlier loads, and slow down the later of two
    before, started = fleet.cpu_s(), time.perf_counter()
    async with asyncio.timeout(LOAD_S):
        streams = await load(fleet.url_port, num=num, concurrency=concurrency, tokens=tokens)
    wall_s = time.perf_counter() - started
    gc.enable()
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


@contextmanager
def services(
    model: Path, tree: Path, own: Mapping[str, str], *, workers: int, step_ms: float, capacity: int
) -> Iterator[tuple[Processes, str]]:
    """Run the queue, a checkout's services, and one process with `workers` fake workers; yield the queue's URL, too.

    own: additional environment variables of the services.
    """
    port = claim_port("127.0.0.1", 0)
    with scratch_folder() as folder:
        queue = start_embedded(folder / "queue")
        processes: dict[str, subprocess.Popen[bytes]] = {}
        try:
            settings = Settings(redis_url=queue.url, model=str(model), data=folder, port=port, log_level="warning")
            usual = Settings().environment()  # other checkouts may lack some settings: omit defaults
            given = {name: value for name, value in settings.environment().items() if usual.get(name) != value}
            environment = child_environment() | given | dict(own) | {"PYTHONPATH": f"{tree}:{tree / 'kernels'}"}
            fake_worker = next(tree.glob("benchmarks/**/fake_worker.py"))
            commands = {
                "scheduler": ["-m", "lorafleet", "serve", "scheduler"],
                "gateway": ["-m", "lorafleet", "serve", "gateway"],
                "workers": ["-P", str(fake_worker), f"--count={workers}", f"--step-ms={step_ms}",
                            f"--capacity={capacity}", "--vocab-size=40000"],
            }  # fmt: skip
            for name, words in commands.items():
                command = [sys.executable, *words]
                processes[name] = subprocess.Popen(command, env=environment, cwd=tree, stdin=subprocess.DEVNULL)
            yield Processes(port, processes, queue.process.pid), queue.url
        finally:
            for process in processes.values():
                process.terminate()
            for process in processes.values():
                process.wait()
            queue.stop()


async def run(
    model: Path,
    tree: Path,
    own: Mapping[str, str],
    *,
    workers: int,
    step_ms: float,
    capacity: int,
    loads: list[dict[str, Any]],
    together: asyncio.Barrier | None = None,
) -> list[dict[str, Any]]:
    """Measure `loads` on new processes of a checkout.

    together: a barrier at which each load waits until all parties are ready.
    """
    results: list[dict[str, Any]] = []
    with services(model, tree, own, workers=workers, step_ms=step_ms, capacity=capacity) as (fleet, queue_url):
        await wait_until_ready(queue_url, fleet, workers)
        await load(fleet.url_port, num=16, concurrency=8, tokens=2)
        async with scraped(fleet.url_port) if own else nullcontext():
            for one in loads:
                if together is not None:
                    await together.wait()
                results.append(await measure(fleet, **one))
    return [{"workers": workers, "step_ms": step_ms, **result} for result in results]


@asynccontextmanager
async def scraped(port: int) -> AsyncIterator[None]:
    """Read the gateway's metrics every five seconds, as Prometheus does."""

    async def scrape() -> None:
        async with httpx2.AsyncClient(trust_env=False) as http:
            while True:
                await http.get(f"http://127.0.0.1:{port}/metrics", headers={"accept": "application/openmetrics-text"})
                await asyncio.sleep(5)

    task = asyncio.create_task(scrape())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def wait_until_ready(queue_url: str, fleet: Processes, workers: int) -> None:
    """Wait until the workers have joined and the gateway listens. Raises RuntimeError if a service ends."""
    bus = Bus(queue_url)
    while len(await bus.members.ids(bus.keys.workers)) < workers or not await _listens(fleet.url_port):
        if any(process.poll() is not None for process in fleet.processes.values()):
            raise RuntimeError("a service ended while starting")
        await asyncio.sleep(0.1)
    await asyncio.sleep(1.0)  # until the scheduler has read every heartbeat
    await bus.close()


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


def fleets(short: bool) -> list[dict[str, Any]]:
    """Return the fleets to measure, each with its loads; `short` halves the loads."""
    part = 2 if short else 1
    idle = {"name": "idle", "num": 200 // part, "concurrency": 1, "tokens": 1}
    requests = {"name": "requests", "num": 9000 // part, "concurrency": 64, "tokens": 1}
    streams = {"name": "256 streams", "num": 512 // part, "concurrency": 256, "tokens": 200}
    full = {"name": "800 streams", "num": 1600 // part, "concurrency": 800, "tokens": 200}
    one, many = ({"name": "scaling", "num": 24 * n, "concurrency": 8 * n, "tokens": 160 // part} for n in (1, 16))
    return [
        {"workers": 1, "step_ms": 0.5, "capacity": 256, "loads": [idle, requests]},
        {"workers": 2, "step_ms": 25, "capacity": 128, "loads": [streams]},
        {"workers": 2, "step_ms": 25, "capacity": 400, "loads": [full]},
        {"workers": 1, "step_ms": 25, "capacity": 8, "loads": [one]},
        {"workers": 16, "step_ms": 25, "capacity": 8, "loads": [many]},
    ]


def figures(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the figures of `TARGETS`, each the median over rounds."""
    rounds = [[result for result in results if result["round"] == i] for i in sorted({r["round"] for r in results})]
    found = [_figures(one) for one in rounds]
    return {key: round(statistics.median(one[key] for one in found), 2) for key in TARGETS}


def _figures(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    named = {result["name"]: result for result in results}
    one, many = (next(r for r in results if r["name"] == "scaling" and r["workers"] == n) for n in (1, 16))
    return {
        "ttft_ms": named["idle"]["ttft_ms"]["p50"],
        "req_s": named["requests"]["req_s"],
        "tok_s": named["800 streams"]["tok_s"],
        "queue_us": named["256 streams"]["cpu_us_per_token"]["queue"],
        "scaling": round(many["tok_s"] / one["tok_s"], 2),
    }


def draw(axes: Sequence[Any], results: dict[str, list[dict[str, Any]]]) -> None:
    """Draw how far each target is reached, and the CPU time per token by process."""
    towards, cost = axes
    colours = dict(zip(results, (report.MUTED, report.BLUE) if len(results) > 1 else (report.BLUE,), strict=True))
    names = [text for text, _, _, _ in TARGETS.values()]
    for i, (label, found) in enumerate(results.items()):
        reached = [
            value / wanted if better is max else wanted / value
            for value, (_, _, wanted, better) in zip(figures(found).values(), TARGETS.values(), strict=True)
        ]
        places = np.arange(len(names)) + (i - (len(results) - 1) / 2) * 0.38
        towards.barh(places, reached, height=0.36, color=colours[label], label=label)
    towards.axvline(1, color=report.RED, linewidth=1)
    towards.set(yticks=range(len(names)), yticklabels=names, title="Times the target", xlabel="more is better")
    towards.invert_yaxis()
    towards.legend(loc="lower right")
    parts = ("gateway", "queue", "workers", "scheduler", "client")
    shades = (report.BLUE, report.ORANGE, report.GREEN, report.RED, report.MUTED)
    for label, found in results.items():
        full = next(result for result in found if result["name"] == "800 streams")
        bottom = 0.0
        for part, shade in zip(parts, shades, strict=True):
            height = full["cpu_us_per_token"][part]
            first = label == next(iter(results))
            cost.bar(label, height, bottom=bottom, width=0.5, color=shade, label=part if first else None)
            bottom += height
    cost.set(title="CPU per token, 800 streams", ylabel="µs")
    cost.legend()


PARTS = ("gateway", "queue", "workers", "scheduler")


def fleet_of(load: str) -> dict[str, Any]:
    """Return the fleet of a load, with that load twice."""
    one = next(one for one in fleets(False) if any(load == each["name"] for each in one["loads"]))
    return one | {"loads": 2 * [each for each in one["loads"] if each["name"] == load]}


def at_once(
    model: Path, kinds: Sequence[tuple[str, Path, Mapping[str, str]]], fleet: Mapping[str, Any], rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """Measure fleets at the same time, so that other load on the machine affects all alike.

    kinds: (label, checkout, environment variables of its services).
    """
    found: dict[str, list[dict[str, Any]]] = {label: [] for label, _, _ in kinds}
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for i in range(rounds):
            order = kinds[:: -1 if i % 2 else 1]

            async def all_of(order: Sequence[tuple[str, Path, Mapping[str, str]]] = order) -> list[Any]:
                barrier = asyncio.Barrier(len(order))
                asked = (run(model, tree, own, together=barrier, **fleet) for _, tree, own in order)
                return await asyncio.gather(*asked)

            for (label, _, _), results in zip(order, runner.run(all_of()), strict=True):
                found[label] += results
    return found


def compare(model: Path, trees: Mapping[str, Path], rounds: int) -> None:
    """Print the CPU time per request and per token of two checkouts under the same load at the same time."""
    rows: list[list[str]] = []
    for load in ("requests", "256 streams"):
        found = at_once(model, [(label, tree, {}) for label, tree in trees.items()], fleet_of(load), rounds)
        for part in (*PARTS, "all"):
            before, now = ([_us(result, part) for result in found[label]] for label in ("before", "now"))
            ratios = [one / max(other, 1e-9) for one, other in zip(now, before, strict=True)]
            middle = [f"{statistics.median(values):.2f}" for values in (before, now)]
            rows.append([load, part, *middle, f"{statistics.geometric_mean(ratios):.3f}"])
    print(report.table(["load", "CPU of", "before, µs", "now, µs", "now ÷ before, mean of pairs"], rows))


def _us(result: Mapping[str, Any], part: str) -> float:
    us = result["cpu_us_per_token"]
    return us[part] if part != "all" else sum(us[one] for one in PARTS)


def observe(model: Path, trees: Mapping[str, Path], share: float, rounds: int, out: Path) -> None:
    """Measure 256 streams with and without metrics and tracing at the same time; print the CPU time per token.

    Each pair of new processes gets two loads. share: share of calls that are traced.
    """
    with sink() as url:
        on = {"LORAFLEET_OTLP_ENDPOINT": url, "LORAFLEET_TRACE_SHARE": str(share), "LORAFLEET_VLLM_METRICS": "true"}
        kinds = [(label, tree, {}) for label, tree in trees.items()] + [("observed", HERE, on)]
        found = at_once(model, kinds, fleet_of("256 streams"), rounds)
    us = {label: [_us(result, "all") for result in results] for label, results in found.items()}
    rows = []
    for label, results in found.items():
        ratios = [one / base for one, base in zip(us[label], us["now"], strict=True)]
        each = [round(statistics.median(r["cpu_us_per_token"][part] for r in results), 2) for part in PARTS]
        speed = round(statistics.median(r["tok_s"] for r in results))
        rows.append([label, round(statistics.median(us[label]), 2), *each, speed,
                     f"{statistics.median(ratios):.3f} ({min(ratios):.3f} … {max(ratios):.3f})"])  # fmt: skip
    print(report.table(["", "µs/token", *PARTS, "tok/s", "÷ now, by pairs"], [[str(v) for v in row] for row in rows]))
    report.save(out / f"observed-{share:g}", {"machine": report.machine(), "results": found})


@contextmanager
def sink() -> Iterator[str]:
    """Run a span collector that discards everything, in its own process; yield its URL."""
    port = claim_port("127.0.0.1", 0)
    code = f"from benchmarks.common.otlp_sink import serve; serve({port})"
    environment = child_environment() | {"PYTHONPATH": str(HERE)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    """Measure, print a table, and save the figures and a plot."""
    parser = report.parser(__doc__)
    parser.add_argument("--before", type=Path, help="another checkout, to be measured in the same run")
    parser.add_argument(
        "--observed", type=float, metavar="SHARE", help="256 streams alone: unobserved, and with this share traced"
    )
    parser.add_argument("--together", action="store_true", help="compare CPU beside the other checkout")
    parser.add_argument("--rounds", type=int, default=1, help="how often everything is measured")
    args = parser.parse_args()
    about = report.machine()
    model = args.model or quickstart_model()
    trees = ({"before": args.before.resolve()} if args.before else {}) | {"now": HERE}
    if args.observed is not None:
        observe(model, trees, args.observed, args.rounds, args.out)
        return
    if args.together:
        if args.before is None:
            parser.error("--together needs --before CHECKOUT")
        compare(model, trees, args.rounds)
        return
    results: dict[str, list[dict[str, Any]]] = {label: [] for label in trees}
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for i in range(args.rounds):
            for one in fleets(args.short):
                for label in list(trees)[:: -1 if i % 2 else 1]:
                    measured = runner.run(run(model, trees[label], {}, **one))
                    results[label] += [{"round": i, **result} for result in measured]
    found = {label: figures(result) for label, result in results.items()}
    rows = [
        [text, *(f"{found[label][key]:,} {unit}" for label in trees), f"{'≥' if better is max else '≤'} {wanted:,.0f}"]
        for key, (text, unit, wanted, better) in TARGETS.items()
    ]
    print(report.table(["", *trees, "wanted"], rows))
    saved = {"machine": about, "figures": found, "results": results}
    report.save(args.out / "control_plane", saved)
    report.plot(args.out / "control_plane", 2, lambda axes: draw(axes, results))


if __name__ == "__main__":
    main()
