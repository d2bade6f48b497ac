"""The time until `lorafleet up MODEL` answers, and the CPU time and memory of its processes at that point.

    python -m benchmarks.fleet.startup MODEL... [--rounds 3] [--flags="--quantization int4"]

A model's first start has an empty cache, except for the native kernels if they were built; later starts find what it
stored. Reported are the seconds from the command until the gateway reports a worker, and until the first token of a
one-token completion arrived; CPU seconds of each process until then; the worker's own loading times, without imports;
and its resident memory after the answer, with the part that is file-backed, which the system can drop and processes
share. Figures are medians of the later rounds. --flags: additional flags of `lorafleet up`.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks.common import report
from benchmarks.common.fleet import scratch_folder, service_of
from benchmarks.peers.servers import Server, first_model, running, up
from lora_kernels.cpu.build import cache_dir

LOADED = re.compile(r"ready in ([\d.]+) s")
MB = 1e6


def start(model: str, scratch: Path, flags: Sequence[str]) -> dict[str, float]:
    """Start a fleet, request a token and stop the fleet. Return seconds by stage, and megabytes."""
    # Bytecode is cached as for an installed package: compiling the sources of five processes takes 0.8 s of CPU time.
    environment = {"LORAFLEET_CACHE_DIR": str(scratch / "cache"), "PYTHONDONTWRITEBYTECODE": ""}
    began = time.monotonic()
    with running(Server("fleet", [*up(model, scratch), *flags], {}, environment), scratch / "up.log") as url:
        found = {"s until it is ready": time.monotonic() - began}
        ask(url)
        found["s until the first token"] = time.monotonic() - began
        for process in [child for child in psutil.Process().children(recursive=True) if child.is_running()]:
            name, used = service_of(process), process.cpu_times()
            found[f"CPU s of {name}"] = found.get(f"CPU s of {name}", 0.0) + used.user + used.system
            if name == "worker" and "lorafleet" in " ".join(process.cmdline()[:3]):
                memory = process.memory_info()
                found["MB of the worker"] = found.get("MB of the worker", 0.0) + memory.rss / MB
                found["MB of these, files'"] = found.get("MB of these, files'", 0.0) + memory.shared / MB
        (log,) = scratch.glob("data/logs/*/worker-0.log")
        if match := LOADED.search(log.read_text()):
            found["s of the worker's, loading"] = float(match[1])
    return found


def ask(url: str) -> None:
    """Request one token from the base, and wait for it."""
    body = json.dumps({"model": first_model(url), "prompt": "Once upon a time", "max_tokens": 1}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] == 1


def weights_mb(model: Path) -> float:
    """Return the size of a model's weights in MB."""
    files = [model] if model.is_file() else [*model.glob("*.safetensors")]
    return sum(path.stat().st_size for path in files) / MB


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="what `lorafleet up` is given")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--flags", type=str.split, default=[])
    args = parser.parse_args()
    kernels = [*cache_dir().glob("lora_kernels-*.so")]
    for model in args.models:
        with scratch_folder() as scratch:
            (scratch / "cache").mkdir()
            for library in kernels:
                shutil.copy(library, scratch / "cache")
            first = start(model, scratch, args.flags)
            later = [start(model, scratch, args.flags) for _ in range(args.rounds)]
        rows = [
            (name, f"{value:.2f}", f"{statistics.median(one.get(name, 0.0) for one in later):.2f}")
            for name, value in first.items()
        ]
        print(f"{model}, weights of {weights_mb(Path(model)):.0f} MB\n")
        print(report.table(("", "first start", "later ones"), rows), flush=True)


if __name__ == "__main__":
    main()
