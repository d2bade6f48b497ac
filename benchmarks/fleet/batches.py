"""The cost of batches: adapter loads in their order, interactive requests meanwhile, and 50,000 lines without a model.

    python -m benchmarks.fleet.batches [--model FOLDER] [--parts order,beside,many] [--short]

- order: lines use 200 adapters in turn, with a pool for 16. Counts the copies into the pool when 3,000 lines are a
  batch, and when 1,000 of the same calls come over HTTP in the file's order, with the same number in flight.
- beside: interactive requests at Poisson times, about a third of the worker's capacity, alternately alone and during a
  batch that fills the worker: time to first token and gaps between tokens.
- many: 50,000 lines of one token for workers without a model: lines per second, and the gateway's memory.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil

from benchmarks.common import report
from benchmarks.common.fleet import (
    RunningFleet,
    Setup,
    adapter_bytes,
    fleet,
    make_adapters,
    quickstart_model,
    scratch_folder,
)
from benchmarks.fleet.control_plane import HERE, services, wait_until_ready
from lorafleet.bench import BenchConfig, BenchTarget, run_bench
from lorafleet.bench.result import inter_token_gaps_s

COMPLETIONS = "/v1/completions"
ENDED = ("completed", "failed", "expired", "cancelled")
RANK = 8
NUM_ADAPTERS, NUM_IN_POOL = 200, 16
IN_FLIGHT = 80  # 1.25 for each of 64 slots, as for a batch
OUTPUT_TOKENS = 64
TURNS = 3  # pairs of interactive requests alone and during a batch, per round
INTERACTIVE = [f"interactive-{index}" for index in range(4)]


def lines_of(models: Sequence[str], num: int, max_tokens: int) -> list[dict[str, Any]]:
    """Return calls of the models in turn, each with its own prompt."""
    rng = np.random.default_rng(0)
    words = [" ".join(f"word{n}" for n in rng.integers(0, 1000, 8)) for _ in range(num)]
    bodies = [
        {"model": models[i % len(models)], "prompt": f"{i} {text}", "max_tokens": max_tokens, "ignore_eos": True}
        for i, text in enumerate(words)
    ]
    return [{"custom_id": str(i), "method": "POST", "url": COMPLETIONS, "body": body} for i, body in enumerate(bodies)]


def begin(url: str, lines: Sequence[dict[str, Any]]) -> str:
    """Start a batch; return its id."""
    text = "\n".join(map(json.dumps, lines)).encode()
    with httpx2.Client(base_url=url, timeout=120, trust_env=False) as http:
        uploaded = http.post("/v1/files", files={"file": ("in.jsonl", text)}, data={"purpose": "batch"})
        asked = {
            "input_file_id": uploaded.raise_for_status().json()["id"], "endpoint": COMPLETIONS,
            "completion_window": "24h",
        }  # fmt: skip
        return http.post("/v1/batches", json=asked).raise_for_status().json()["id"]


def look(url: str, batch_id: str) -> dict[str, Any]:
    """Return a batch."""
    return httpx2.get(f"{url}/v1/batches/{batch_id}", timeout=60, trust_env=False).raise_for_status().json()


def finish(url: str, batch_id: str) -> dict[str, Any]:
    """Wait for the end of a batch; return it. Raises RuntimeError unless every line has an answer."""
    while (batch := look(url, batch_id))["status"] not in ENDED:
        time.sleep(0.5)
    if batch["status"] != "completed" or batch["request_counts"]["failed"]:
        raise RuntimeError(f"the batch is {batch['status']}: {batch['request_counts']}, {batch['errors']}")
    return batch


def ask_in_order(url: str, lines: Sequence[dict[str, Any]]) -> None:
    """Send the calls over HTTP in the order of the file, `IN_FLIGHT` at a time."""
    with httpx2.Client(base_url=url, timeout=600, trust_env=False) as http, ThreadPoolExecutor(IN_FLIGHT) as pool:

        def ask(line: dict[str, Any]) -> None:
            http.post(line["url"], json={**line["body"], "service_tier": "flex"}).raise_for_status()

        list(pool.map(ask, lines))


def measure_order(model: Path, scratch: Path, num_lines: int) -> dict[str, Any]:
    """Return the adapter loads of a batch, and those of the same calls in the order of the file."""
    names, adapters = [f"a{index:03}" for index in range(NUM_ADAPTERS)], scratch / "order-adapters"
    make_adapters(model, adapters, names, [RANK])
    pool_bytes = NUM_IN_POOL * adapter_bytes(adapters, names[0])
    environment = {"LORAFLEET_ADAPTER_POOL_BYTES": str(pool_bytes), "LORAFLEET_KV_CACHE_BYTES": str(1 << 30)}
    (scratch / "order").mkdir()
    found: dict[str, Any] = {}
    with fleet(Setup(model, adapters, scratch / "order", environment=environment)) as running:
        for name in ("as a batch", "in the order of the file"):
            num = num_lines if name == "as a batch" else num_lines // 3
            lines, before, started = lines_of(names, num, 8), running.num_loads()[0], time.monotonic()
            if name == "as a batch":
                finish(running.url, begin(running.url, lines))
            else:
                ask_in_order(running.url, lines)
            seconds = time.monotonic() - started
            num_loads = running.num_loads()[0] - before
            found[name] = {"loads": num_loads, "seconds": seconds, "loads_per_1000": 1000 * num_loads / num}
    return found


def interactive(running: RunningFleet, num: int, rate: float, seed: int) -> BenchConfig:
    """Return the load of interactive requests, 64 words in and 64 tokens out."""
    targets = tuple(BenchTarget.model(name) for name in INTERACTIVE)
    return BenchConfig(
        url=running.url, targets=targets, num_requests=num, concurrency=num, rate_per_s=rate, prompt_words=64,
        output_tokens=OUTPUT_TOKENS, seed=seed,
    )  # fmt: skip


def measure_beside(model: Path, scratch: Path, rounds: int, per_turn: int) -> dict[str, Any]:
    """Return TTFT and token gaps of interactive requests, alone and during a batch that fills the rest."""
    adapters = scratch / "beside-adapters"
    names = [f"batch-{index}" for index in range(8)]
    make_adapters(model, adapters, [*INTERACTIVE, *names], [RANK])
    (scratch / "beside").mkdir()
    ttft: dict[str, list[list[float]]] = {"alone": [], "beside a batch": []}  # one list per round
    gaps: dict[str, list[list[float]]] = {"alone": [], "beside a batch": []}
    lines_per_s: list[float] = []
    environment = {"LORAFLEET_KV_CACHE_BYTES": str(1 << 30)}
    with fleet(Setup(model, adapters, scratch / "beside", environment=environment)) as running:
        targets = tuple(BenchTarget.model(name) for name in [*INTERACTIVE, *names])
        full = BenchConfig(
            url=running.url, targets=targets, num_requests=96, concurrency=32, prompt_words=64, output_tokens=64
        )  # fmt: skip
        run_bench(full)  # loads the adapters
        rate = run_bench(full).summary.requests_per_s / 3
        for turn in range(rounds * TURNS):
            for name in ttft:
                batch_id = "" if name == "alone" else begin_filling(running, names)
                before, started = num_tokens(running), time.monotonic()
                seed = 2 * turn + bool(batch_id)  # otherwise the prompts would be in the prefix cache
                measured = run_bench(interactive(running, per_turn, rate, seed))
                if batch_id:
                    num = num_tokens(running) - before - per_turn * OUTPUT_TOKENS
                    lines_per_s.append(num / OUTPUT_TOKENS / (time.monotonic() - started))
                    httpx2.post(f"{running.url}/v1/batches/{batch_id}/cancel", trust_env=False)
                    with suppress(RuntimeError):
                        finish(running.url, batch_id)
                if turn % TURNS == 0:
                    ttft[name].append([])
                    gaps[name].append([])
                ttft[name][-1] += [1e3 * (record.arrivals_s[0] - record.start_s) for record in measured.records]
                gaps[name][-1] += (1e3 * inter_token_gaps_s(measured.records)).tolist()
        batch_alone_per_s = rate_alone(running, names)
    found: dict[str, Any] = {
        "rate_per_s": rate, "batch_lines_per_s": lines_per_s, "batch_alone_lines_per_s": batch_alone_per_s
    }  # fmt: skip
    for what, values in (("ttft_ms", ttft), ("gap_ms", gaps)):
        found[what] = {name: percentiles(of_rounds) for name, of_rounds in values.items()}
        for q in ("p50", "p99"):
            alone, beside = (found[what][name][q] for name in values)
            found[f"{what}_{q}_ratio"] = beside["median"] / alone["median"]
    return found


def rate_alone(running: RunningFleet, names: Sequence[str]) -> float:
    """Return the lines per second of a batch without other requests."""
    batch_id = begin_filling(running, names)
    before, started = num_tokens(running), time.monotonic()
    time.sleep(15.0)
    found = (num_tokens(running) - before) / OUTPUT_TOKENS / (time.monotonic() - started)
    httpx2.post(f"{running.url}/v1/batches/{batch_id}/cancel", trust_env=False)
    return found


def begin_filling(running: RunningFleet, names: Sequence[str]) -> str:
    """Start a batch that fills the fleet's spare capacity; return its id once its first lines are answered."""
    batch_id = begin(running.url, lines_of(names, 5000, OUTPUT_TOKENS))
    while not look(running.url, batch_id)["request_counts"]["completed"]:
        time.sleep(0.2)
    return batch_id


def num_tokens(running: RunningFleet) -> int:
    """Return the number of tokens that the workers emitted: lines are too long to be counted within seconds."""
    return sum(beat.counters.num_output_tokens for beat in running.beats_of_now())


def percentiles(of_rounds: Sequence[Sequence[float]]) -> dict[str, dict[str, Any]]:
    """Return percentiles of each round with their median, and of all rounds together."""
    found: dict[str, dict[str, Any]] = {}
    for q in (50, 90, 99):
        each = [float(np.percentile(some, q)) for some in of_rounds]
        together = float(np.percentile(np.concatenate(of_rounds), q))
        found[f"p{q}"] = {"rounds": each, "median": float(np.median(each)), "together": together}
    return found


def measure_many(model: Path, num_lines: int) -> dict[str, Any]:
    """Measure a batch of tiny calls for workers without a model: lines per second, and the gateway's memory in MB."""
    with services(model, HERE, {}, workers=4, step_ms=5.0, capacity=256) as (own, queue_url):
        url = f"http://127.0.0.1:{own.url_port}"
        pids = {"gateway": own.processes["gateway"].pid, "queue": own.queue_pid}
        rss: dict[str, dict[str, float]] = {name: {} for name in pids}
        asyncio.run(wait_until_ready(queue_url, own, 4))
        batch_id, started = begin(url, lines_of(["fake"], num_lines, 1)), time.monotonic()
        while (batch := look(url, batch_id))["status"] not in ENDED:
            fifth = min(4, batch["request_counts"]["completed"] * 5 // num_lines)
            until = f"up to {(fifth + 1) * num_lines // 5} lines"
            for name, pid in pids.items():
                rss[name][until] = max(rss[name].get(until, 0.0), psutil.Process(pid).memory_info().rss / 1e6)
            time.sleep(0.5)
        finish(url, batch_id)
        seconds = time.monotonic() - started
    return {"lines": num_lines, "lines_per_s": num_lines / seconds, "largest_rss_mb": rss}


def main() -> None:
    """Measure and print."""
    parser = report.parser(__doc__, without=("out",))
    parser.add_argument("--parts", default="order,beside,many", help="what to measure (default: all)")
    args = parser.parse_args()
    parts, model = args.parts.split(","), args.model or quickstart_model()
    found: dict[str, Any] = {"machine": report.machine()}
    with scratch_folder() as scratch:
        if "order" in parts:
            found["order"] = measure_order(model, scratch, 600 if args.short else 3000)
        if "beside" in parts:
            found["beside"] = measure_beside(model, scratch, 1 if args.short else 3, 15 if args.short else 30)
        if "many" in parts:
            found["many"] = measure_many(model, 5_000 if args.short else 50_000)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
