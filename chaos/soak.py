"""Load for a long time, below or far above a fleet's capacity; records every process's memory, refusals and answers.

With `--fleet-cpus 1 --client-cpus 0`, clients that ask for ten times the fleet's capacity take no CPU time from it.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import datetime
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from chaos.check import percentile
from chaos.fleet import ProcessFleet, Shape
from chaos.report import machine
from lorafleet.bench.client import Client
from lorafleet.bench.result import BenchRequest
from protocol.runtime.service import set_up_logging

logger = logging.getLogger(__name__)

PROBE_S = 20.0
SAMPLE_S = 5.0
PAUSE_S = 1.0  # maximum pause of the clients themselves that is not reported
NUM_TEMPLATES = 8
READ_TIMEOUT_S = 300.0
MAX_TOLD = 200  # errors that are logged one by one


@dataclass(slots=True)
class Course:
    """Outcomes of the calls, and the memory of the processes."""

    num_asked: int = 0
    seconds: float = 0.0  # during which calls were begun
    outcomes: Counter[str] = field(default_factory=Counter)
    ttft_s: list[float] = field(default_factory=list)
    refusals: list[tuple[float, float]] = field(default_factory=list)  # (when, Retry-After), s
    completed_s: list[float] = field(default_factory=list)  # when each complete answer arrived, in order
    rss_mb: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # process -> (s since the start, MB)
    pauses: list[tuple[float, float]] = field(default_factory=list)  # of the clients themselves: (s since the start, s)

    @property
    def errors(self) -> dict[str, int]:
        """Number of calls, by error, that got neither a complete answer nor a refusal with a Retry-After."""
        return {name: num for name, num in self.outcomes.items() if name not in ("complete", "429")}

    def share_kept(self, num: int) -> float:
        """Return the share of refusals, in [0, 1], after which `num` answers completed within their Retry-After."""
        done = self.completed_s
        kept = [bisect.bisect(done, at + told) - bisect.bisect(done, at) >= num for at, told in self.refusals]
        return sum(kept) / max(len(kept), 1)


class Load:
    """Sends calls of random adapters at given times."""

    def __init__(self, fleet: ProcessFleet, models: list[str], num_tokens: int, seed: int) -> None:
        self._fleet = fleet
        self._models = models
        self._num_tokens = num_tokens  # per answer
        self._rng = random.Random(seed)
        self._clients = [Client(url) for url in fleet.urls]
        self.course = Course()

    def close(self) -> None:
        """Close all connections."""
        for client in self._clients:
            client.close()

    async def probe(self, num_clients: int) -> float:
        """Return the calls per second that the fleet answers with `num_clients` clients asking without a pause.

        A warm-up of the same length comes first, uncounted, in which everything is loaded once.
        """
        course, began_s = Course(), time.monotonic()

        async def be_client() -> None:
            while time.monotonic() < began_s + 2 * PROBE_S:
                await self._call(course)

        await asyncio.gather(*(be_client() for _ in range(num_clients)))
        counted = [at for at in course.completed_s if PROBE_S <= at - began_s < 2 * PROBE_S]
        return len(counted) / PROBE_S

    async def run(self, rate: float, seconds: float) -> None:
        """Send `rate` calls per second (a Poisson process) for `seconds`; wait for every answer."""
        began_s, next_s = time.monotonic(), time.monotonic()
        watch = asyncio.create_task(self._watch(began_s))
        async with asyncio.TaskGroup() as group:
            while next_s < began_s + seconds:
                await asyncio.sleep(max(0.0, next_s - time.monotonic()))
                group.create_task(self._call(self.course))
                next_s += self._rng.expovariate(rate)
            self.course.seconds = time.monotonic() - began_s
        watch.cancel()

    async def _call(self, course: Course) -> None:
        course.num_asked += 1
        body = {
            "model": self._rng.choice(self._models), "prompt": f"Prompt {self._rng.randrange(1000)}", "stream": True,
            "max_tokens": self._num_tokens, "temperature": 0, "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        record = BenchRequest(str(body["model"]), start_s=time.perf_counter())
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                await self._rng.choice(self._clients).post("/v1/completions", body, record)
        except OSError as error:  # includes TimeoutError
            record.error = record.error or repr(error)
        self._count(course, record)

    def _count(self, course: Course, record: BenchRequest) -> None:
        now_s = time.monotonic()
        if record.arrivals_s:
            course.ttft_s.append(record.arrivals_s[0] - record.start_s)
        if record.status == 429 and record.headers.get("x-should-retry") == "true":
            course.refusals.append((now_s, float(record.headers["retry-after"])))
            course.outcomes["429"] += 1
        elif record.error is not None:
            course.outcomes[record.error] += 1
            if sum(course.errors.values()) <= MAX_TOLD:
                age_s = time.perf_counter() - record.start_s
                logger.warning(
                    "%s, after %.1f s and %d chunks: %s", record.target, age_s, len(record.arrivals_s), record.error
                )
        elif record.complete and record.finish_reason == "length" and record.output_tokens == self._num_tokens:
            course.outcomes["complete"] += 1
            course.completed_s.append(now_s)
        else:
            course.outcomes["broken"] += 1

    async def _watch(self, began_s: float) -> None:
        while True:
            for name, pid in self._pids().items():
                rss = sum(p.memory_info().rss for p in _family(pid)) / 1e6
                self.course.rss_mb.setdefault(name, []).append((time.monotonic() - began_s, rss))
            slept_s = time.monotonic()
            await asyncio.sleep(SAMPLE_S)
            late_s = time.monotonic() - slept_s - SAMPLE_S
            if late_s >= PAUSE_S:  # not the fleet's fault: the machine gave this process no CPU time
                logger.warning("the clients stood still for %.1f s", late_s)
                self.course.pauses.append((time.monotonic() - began_s, late_s))

    def _pids(self) -> dict[str, int]:
        return {"queue": self._fleet.queue.process.pid} | {m.name: m.pid for m in self._fleet.members.values()}


def slope_mb_per_h(samples: list[tuple[float, float]]) -> float:
    """Return the slope of the line through the second half of samples (s, MB); caches fill during the first half."""
    late = samples[len(samples) // 2 :]
    mean_s = sum(s for s, _ in late) / len(late)
    mean_mb = sum(mb for _, mb in late) / len(late)
    spread = sum((s - mean_s) ** 2 for s, _ in late)
    return 3600 * sum((s - mean_s) * (mb - mean_mb) for s, mb in late) / spread if spread else 0.0


def as_markdown(course: Course, sustained: float, max_queued: int, where: str) -> str:
    """Return the report. sustained: calls per second. where: command and machine."""
    outcomes = ", ".join(f"{num:,} {name}" for name, num in course.outcomes.most_common())
    minutes, rate = course.seconds / 60, course.num_asked / course.seconds
    lines = [
        f"{where}, {datetime.date.today()}: {minutes:.0f} minutes at {rate:.1f} calls/s where the fleet "
        f"sustains {sustained:.1f}; {course.num_asked:,} calls: {outcomes}. "
        f"**Errors: {sum(course.errors.values())}.**",
    ]
    if course.ttft_s:
        p50, p99 = percentile(course.ttft_s, 0.5), percentile(course.ttft_s, 0.99)
        lines[0] += f" TTFT p50 {p50:.2f} s, p99 {p99:.2f} s."
    if course.refusals:
        told = [seconds for _, seconds in course.refusals]
        lines[0] += f" Retry-After p50 {percentile(told, 0.5):.0f} s, at most {max(told):.0f} s: within it a tenth of "
        lines[0] += (
            f"`max_queued` was answered after {100 * course.share_kept(max_queued // 10):.1f} % of the refusals."
        )
    if course.pauses:
        longest_s = max(seconds for _, seconds in course.pauses)
        lines[0] += f" The clients themselves stood still {len(course.pauses)} times, for up to {longest_s:.1f} s."
    lines += ["", "| process | RSS at begin, MB | middle | end | largest | slope of the second half, MB/h |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for name, samples in course.rss_mb.items():
        mb = [value for _, value in samples]
        shown = " | ".join(f"{value:.0f}" for value in (mb[0], mb[len(mb) // 2], mb[-1], max(mb)))
        lines.append(f"| {name} | {shown} | {slope_mb_per_h(samples):+.0f} |")
    return "\n".join(lines) + "\n"


def _family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


async def _soak(args: argparse.Namespace, folder: Path) -> tuple[Course, float]:
    """Return the results, and the calls per second that the fleet sustains."""
    from tests.helpers.factories import make_adapter, make_tiny_model

    model, adapters = make_tiny_model(folder / "model", max_len=2048), folder / "adapters"
    for i in range(NUM_TEMPLATES):
        make_adapter(folder / "templates" / str(i), model, rank=8 if i % 2 else 16, seed=i)
    names = [f"a{i:03}" for i in range(args.adapters)]
    for i, name in enumerate(names):
        _copy(folder / "templates" / str(i % NUM_TEMPLATES), adapters / name, 16 + i)
    _stay_on(args.fleet_cpus)  # inherited by every process started from here on
    limits = {"max_queued": args.max_queued, "adapter_pool_bytes": 8 << 20, "adapter_host_bytes": 16 << 20}
    fleet = ProcessFleet.prepare(folder, model, adapters, durable=True, **limits)
    try:
        await fleet.start_all(Shape(gateways=2, schedulers=2, workers=("w0", "w1")))
        _stay_on(args.client_cpus)
        while True:
            if len(await fleet.bus.adapters.aliases()) == len(names):
                break
            await asyncio.sleep(0.2)
        load = Load(fleet, names, args.tokens, args.seed)
        sustained = await load.probe(args.probe_clients)
        rate = sustained * args.share
        logger.info("sustained: %.1f calls/s; asking for %.1f", sustained, rate)
        await load.run(rate, args.minutes * 60)
        load.close()
        return load.course, sustained
    finally:
        await fleet.close()
        args.out.mkdir(parents=True, exist_ok=True)
        for log in (*(member.log for member in fleet.members.values()), fleet.queue.log):
            if log.exists():
                shutil.copy(log, args.out)


def _stay_on(cpus: str) -> None:
    if cpus:
        os.sched_setaffinity(0, {int(cpu) for cpu in cpus.split(",")})


def _copy(template: Path, folder: Path, alpha: int) -> None:
    """Write an adapter with a template's weights and its own alpha: another adapter, with other answers."""
    folder.mkdir(parents=True)
    config = json.loads((template / "adapter_config.json").read_text()) | {"lora_alpha": alpha / 8}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").hardlink_to(template / "adapter_model.safetensors")


def main() -> int:
    """Run the command line. The exit code is 1 on an error."""
    parser = argparse.ArgumentParser(prog="python -m chaos.soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--share", type=float, default=0.8, help="of the load that the fleet sustains")
    parser.add_argument("--probe-clients", type=int, default=32, help="that find out which load it sustains")
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--max-queued", type=int, default=10_000, help="of the gateways")
    parser.add_argument("--fleet-cpus", default="", help="CPUs of every process of the fleet, as 0,1 (default: all)")
    parser.add_argument("--client-cpus", default="", help="CPUs of the clients")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, default=Path("build/soak"), help="folder for the report and the logs of all services"
    )
    args = parser.parse_args()
    set_up_logging("soak", "info")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    where = f"`python -m chaos.soak {' '.join(sys.argv[1:])}` on {machine()}"
    with tempfile.TemporaryDirectory(prefix="lorafleet-soak-") as scratch:
        course, sustained = asyncio.run(_soak(args, Path(scratch)))
    report = as_markdown(course, sustained, args.max_queued, where)
    (args.out / "report.md").write_text(report)
    print(report)
    return 1 if course.errors else 0


if __name__ == "__main__":
    sys.exit(main())
