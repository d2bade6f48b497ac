"""Layers with recurrent states on a CPU: the native operations compared with transformers' functions, in one run.

    python -m benchmarks.engine.states

The layers are one of Qwen3.5-0.8B's shape in bf16, with its gated delta rule (16 heads, keys and values of 128) and its
causal convolution (6,144 channels, 4 taps), and one of Mamba2's scan: 64 heads of 64 numbers, 8 groups, states of 128.
Cases are one token each of 1, 8 and 32 sequences, and a prompt of 64 and of 512 tokens. Each figure is the median of
alternating calls, so that both see the same machine. With OMP_NUM_THREADS=1 seconds are CPU seconds. The run takes two
minutes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.qwen3_5 import modeling_qwen3_5 as transformers_model

from benchmarks.common import report
from gpu_worker.layers.mixers import ChunkScan, Convolution, DeltaRule, Run, StateBatch

HEADS, DIM, TAPS = 16, 128, 4
CHANNELS = 3 * HEADS * DIM
SECONDS = 2.0  # measured per figure
DTYPE = torch.bfloat16
CASES = {"1 token of 1": (1, 1), "1 token of 8": (8, 1), "1 token of 32": (32, 1), "64 tokens": (1, 64),
         "512 tokens": (1, 512)}  # fmt: skip
"""Number of sequences, and tokens of each."""


def batch_of(num_seqs: int, num_tokens: int) -> StateBatch:
    """Return a step in which every sequence has `num_tokens` tokens and its state in its own slot."""
    if num_tokens == 1:
        return StateBatch.of([(i, i, i) for i in range(num_seqs)], [], [], torch.device("cpu"))
    runs = [Run(i * num_tokens, (i + 1) * num_tokens, i, i, num_tokens) for i in range(num_seqs)]
    return StateBatch.of([], runs, [], torch.device("cpu"))


def delta_rule(num_rows: int, num_seqs: int) -> tuple[DeltaRule, tuple[Any, ...], dict[str, Any]]:
    """Return a layer's delta rule, and the arguments and options to call it with."""
    q, k, v = (torch.randn(1, num_rows, HEADS, DIM).to(DTYPE) for _ in range(3))
    g, beta = -torch.rand(1, num_rows, HEADS), torch.rand(1, num_rows, HEADS).to(DTYPE)
    options: dict[str, Any] = {"g": g, "beta": beta, "use_qk_l2norm_in_kernel": True}
    many, one = transformers_model.torch_chunk_gated_delta_rule, transformers_model.torch_recurrent_gated_delta_rule
    call = DeltaRule(many, one, (q, k, v), options)
    call.allocate(num_seqs, torch.device("cpu"))
    return call, (q, k, v), options


def convolution(num_rows: int, num_seqs: int) -> tuple[Convolution, tuple[Any, ...], dict[str, Any]]:
    """Return a layer's convolution, and the arguments and options to call it with."""
    x, weight = torch.randn(1, num_rows, CHANNELS).to(DTYPE).transpose(1, 2), torch.randn(CHANNELS, TAPS).to(DTYPE)
    options: dict[str, Any] = {"activation": "silu"}
    many, one = transformers_model.causal_conv1d_fn, transformers_model.causal_conv1d_update
    call = Convolution(many, one, (x, weight, None), options)
    call.allocate(num_seqs, torch.device("cpu"))
    return call, (x, weight, None), options


def scan(num_rows: int, num_seqs: int) -> tuple[ChunkScan, tuple[Any, ...], dict[str, Any]]:
    """Return a layer's scan, and the arguments and options to call it with."""
    heads, width, groups, size = 64, 64, 8, 128
    x, dt = torch.randn(1, num_rows, heads, width).to(DTYPE), torch.randn(1, num_rows, heads).to(DTYPE)
    into, out = torch.randn(2, 1, num_rows, groups, size).to(DTYPE)
    given = (x, dt, -torch.rand(heads), into, out)
    options = {"chunk_size": 256, "D": torch.ones(heads), "dt_bias": torch.zeros(heads), "dt_softplus": True}
    many, one = modeling_mamba2.mamba2_chunk_scan, modeling_mamba2.mamba2_selective_state_update
    call = ChunkScan(many, one, given, options)
    call.allocate(num_seqs, torch.device("cpu"))
    return call, given, options


def medians(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median time of each call in ms; the calls alternate."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    until = time.perf_counter() + SECONDS
    while time.perf_counter() < until or len(next(iter(times.values()))) < 5:
        for name, call in calls.items():
            begin = clock()
            call()
            times[name].append(1e3 * (clock() - begin))
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def main() -> None:
    """Measure, print a table, and save the figures."""
    args = report.parser(__doc__, without=("model", "short")).parse_args()
    about = report.native_machine()
    points = []
    with torch.inference_mode():
        makers = {"gated delta rule": delta_rule, "causal convolution": convolution, "Mamba2's scan": scan}
        for name, make in makers.items():
            for case, (num_seqs, num_tokens) in CASES.items():
                call, given, options = make(num_seqs * num_tokens, num_seqs)
                batch = batch_of(num_seqs, num_tokens)
                ways = {"transformers": call.by_transformers, "native": call.run}
                found = medians({way: partial(run, batch, given, options) for way, run in ways.items()})
                points.append({"operation": name, "case": case, **found})
    rows = [
        (p["operation"], p["case"], f"{p['transformers']:.3f}", f"{p['native']:.3f}",
         f"{p['transformers'] / p['native']:.1f}")
        for p in points
    ]  # fmt: skip
    print(report.table(("operation", "case", "transformers, ms", "native, ms", "ratio"), rows))
    report.save(args.out / "states", about | {"points": points})


if __name__ == "__main__":
    main()
