"""The weight bytes that one stream reads per second through the whole path, compared with a plain read of them.

    python -m benchmarks.fleet.one_stream MODEL.gguf [--rounds 16]

A fleet started by `lorafleet up` answers one request at a time, 64 random words in and 64 tokens out, streamed. Between
two answers this process reads as much memory as a token does, twelve times, with all cores. A token reads every weight
of the file except an embedding that has a separate head; its keys and values, which are small here, are not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import gguf
import torch

from benchmarks.common import report
from benchmarks.common.fleet import scratch_folder
from benchmarks.peers.servers import Server, first_model, running, up
from lorafleet.bench import BenchConfig, BenchTarget, run_bench

READS = 12


def bytes_of_a_token(file: Path) -> int:
    """Return the total bytes of the matrices that one token is multiplied with."""
    tensors: list[Any] = gguf.GGUFReader(file).tensors
    matrices = {str(tensor.name): int(tensor.n_bytes) for tensor in tensors if len(tensor.shape) > 1}
    if "output.weight" in matrices:
        del matrices["token_embd.weight"]
    return sum(matrices.values())


def seconds_of_a_read(memory: torch.Tensor) -> float:
    """Return the median seconds of `READS` reads."""
    times: list[float] = []
    for _ in range(READS):
        begin = time.perf_counter()
        torch.sum(memory)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def seconds_of_a_token(url: str, model: str, seed: int) -> float:
    """Return the mean seconds between two tokens of one answer."""
    load = BenchConfig(
        url=url, targets=(BenchTarget.model(model),), concurrency=1, num_requests=1, output_tokens=64, seed=seed
    )
    (record,) = run_bench(load).records
    return (record.arrivals_s[-1] - record.arrivals_s[0]) / (len(record.arrivals_s) - 1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a GGUF file whose weights are more than the processor's caches hold")
    parser.add_argument("--rounds", type=int, default=16)
    args = parser.parse_args()
    size = bytes_of_a_token(args.file)
    memory, machine = torch.ones(size // 4), report.machine()
    with (
        scratch_folder() as scratch,
        running(Server("Lorafleet", up(args.file, scratch), {}), scratch / "up.log") as url,
    ):
        model = first_model(url)
        seconds_of_a_token(url, model, 0)
        pairs = [(seconds_of_a_token(url, model, seed + 1), seconds_of_a_read(memory)) for seed in range(args.rounds)]
    shares = sorted(read / token for token, read in pairs)
    rows = [(f"{1e3 * token:.1f}", f"{1e-9 * size / token:.1f}", f"{1e-9 * size / read:.1f}") for token, read in pairs]
    print(machine)
    print(report.table(("ms a token", "GB/s", "a read, GB/s"), rows))
    print(f"{size / 1e6:.0f} MB: {statistics.median(shares):.2f} of a read ({shares[0]:.2f} to {shares[-1]:.2f})")


if __name__ == "__main__":
    main()
