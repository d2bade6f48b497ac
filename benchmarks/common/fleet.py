"""A whole fleet for a benchmark: its start, its adapters, and the figures that its workers report."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import psutil

from benchmarks.peers.make_adapters import make_adapter
from benchmarks.peers.servers import Server, running, up
from lorafleet.launcher.embedded import start_embedded
from lorafleet.quickstart import fetch_quickstart_model
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings
from protocol.wire.messages import WorkerBeat

LIST_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Setup:
    """The model, adapters and settings of a fleet."""

    model: Path
    adapters: Path
    scratch: Path  # folder for the queue, the store's blobs and the logs
    flags: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunningFleet:
    """A running fleet."""

    url: str
    queue_url: str

    def beats(self) -> list[WorkerBeat]:
        """Return the latest heartbeat of every live worker."""
        return asyncio.run(_beats(self.queue_url))

    def beats_of_now(self) -> list[WorkerBeat]:
        """Wait for the next heartbeat of every worker, which sends one per second, and return them."""
        now_ms = time.time_ns() // 1_000_000
        while True:
            beats = self.beats()
            if beats and all(beat.sent_ms > now_ms for beat in beats):
                return beats
            time.sleep(0.1)

    def num_loads(self) -> tuple[int, int]:
        """Return the numbers of adapters that the workers have copied into their pools, and that they have fetched."""
        beats = self.beats_of_now()
        return sum(beat.num_loads for beat in beats), sum(beat.num_fetches for beat in beats)


def service_of(process: psutil.Process) -> str:
    """Return the kind of a process of the fleet: a service, the queue's server, or the launcher."""
    words = process.cmdline()
    if "gpu_worker.adapters.loader.process" in words:
        return "loader"
    if "serve" in words:
        return words[words.index("serve") + 1]
    return "launcher" if "up" in words else Path(words[0]).name if words else "?"


def cpu_s() -> dict[str, float]:
    """Return the CPU seconds used so far by each service below this process, and by this process.

    Processes that have ended are not counted.
    """
    used: dict[str, float] = {"this benchmark": time.process_time()}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            name, times = service_of(process), process.cpu_times()
            used[name] = used.get(name, 0.0) + times.user + times.system
    return used


async def _beats(queue_url: str) -> list[WorkerBeat]:
    bus = Bus(queue_url)
    try:
        return [beat for beat in (await bus.members.worker_beats()).values() if beat is not None]
    finally:
        await bus.close()


def quickstart_model() -> Path:
    """Return the folder of the model that `lorafleet demo` uses, downloading it if necessary."""
    return fetch_quickstart_model(Settings().data / "models")


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a folder that is deleted afterwards, also if this process gets SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="lorafleet-bench-") as folder:
        yield Path(folder)


@contextmanager
def fleet(setup: Setup) -> Iterator[RunningFleet]:
    """Run `lorafleet up` on a free port during the block, which begins once all adapters are listed.

    Raises RuntimeError if the fleet does not start.
    """
    queue = start_embedded(setup.scratch / "queue")
    command = [*up(setup.model, setup.scratch), "--adapters", str(setup.adapters), "--dtype", "bfloat16"]
    command += ["--redis-url", queue.url, *setup.flags]
    try:
        with running(Server("Lorafleet", command, {}, dict(setup.environment)), setup.scratch / "fleet.log") as url:
            _wait_listed(url, len(list(setup.adapters.glob("*/adapter_config.json"))))
            yield RunningFleet(url, queue.url)
    finally:
        queue.stop()


def _wait_listed(url: str, num_adapters: int) -> None:
    deadline = time.monotonic() + LIST_TIMEOUT_S
    while time.monotonic() < deadline:
        models = httpx2.get(f"{url}/v1/models", timeout=60).raise_for_status().json()["data"]
        served = [model for model in models if model.get("parent")]
        if len(served) >= num_adapters:
            return
        time.sleep(0.5)
    raise RuntimeError(f"not all of {num_adapters} adapters are served after {LIST_TIMEOUT_S:.0f} s")


def make_adapters(model: Path, root: Path, names: Sequence[str], ranks: Sequence[int]) -> None:
    """Write adapters of all linear layers, with the ranks of `ranks` in turn.

    Adapters of one rank share a weights file by hard links. They differ in `lora_alpha`, so they have different digests
    and give different answers.
    """
    templates: dict[int, Path] = {}
    for rank in ranks:
        templates[rank] = root.with_name(f"{root.name}-templates") / f"rank-{rank}"
        if not templates[rank].exists():
            make_adapter(model, templates[rank], rank, seed=rank)
    for index, name in enumerate(names):
        rank = ranks[index % len(ranks)]
        folder = root / name
        folder.mkdir(parents=True)
        config = json.loads((templates[rank] / "adapter_config.json").read_text())
        config["lora_alpha"] = rank * (0.5 + 1.5 * (index + 1) / len(names))
        (folder / "adapter_config.json").write_text(json.dumps(config))
        os.link(templates[rank] / "adapter_model.safetensors", folder / "adapter_model.safetensors")


def adapter_bytes(root: Path, name: str) -> int:
    """Return the size of an adapter's weights file in bytes."""
    return (root / name / "adapter_model.safetensors").stat().st_size
