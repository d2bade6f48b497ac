"""Layers that keep states, on a CPU: the native operations beside transformers' functions, in one run.

    python -m benchmarks.engine.states

One layer of Qwen3.5-0.8B's shape in bf16: its gated delta rule (16 heads, keys and values of 128) and its causal
convolution (6,144 channels, 4 taps), for one token each of 1, 8 and 32 sequences and for a prompt of 64 and of 512
tokens. Each figure is the median of calls that take turns, so that both see the same machine. Takes a minute.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import orjson
import torch
from transformers.models.qwen3_5 import modeling_qwen3_5 as transformers_model

from benchmarks.common import report
from gpu_worker.layers.mixers import Convolution, DeltaRule, Run, StateBatch
from lora_kernels import cpu

HEADS, DIM, TAPS = 16, 128, 4
CHANNELS = 3 * HEADS * DIM
SECONDS = 2.0  # of each figure
DTYPE = torch.bfloat16
CASES = {"1 token of 1": (1, 1), "1 token of 8": (8, 1), "1 token of 32": (32, 1), "64 tokens": (1, 64),
         "512 tokens": (1, 512)}  # fmt: skip
"""Sequences, and tokens of each."""


def batch_of(num_seqs: int, num_tokens: int) -> StateBatch:
    """Return a step of which every sequence has tokens, from the state in its own slot."""
    if num_tokens == 1:
        return StateBatch.of([(i, i, i) for i in range(num_seqs)], [], [], torch.device("cpu"))
    runs = [Run(i * num_tokens, (i + 1) * num_tokens, i, i, num_tokens) for i in range(num_seqs)]
    return StateBatch.of([], runs, [], torch.device("cpu"))


def delta_rule(num_rows: int, num_seqs: int) -> tuple[DeltaRule, tuple[Any, ...], dict[str, Any]]:
    """Return a layer's delta rule, and what it is called with."""
    q, k, v = (torch.randn(1, num_rows, HEADS, DIM).to(DTYPE) for _ in range(3))
    g, beta = -torch.rand(1, num_rows, HEADS), torch.rand(1, num_rows, HEADS).to(DTYPE)
    options: dict[str, Any] = {"g": g, "beta": beta, "use_qk_l2norm_in_kernel": True}
    many, one = transformers_model.torch_chunk_gated_delta_rule, transformers_model.torch_recurrent_gated_delta_rule
    call = DeltaRule(many, one, (q, k, v), options)
    call.allocate(num_seqs, torch.device("cpu"))
    return call, (q, k, v), options


def convolution(num_rows: int, num_seqs: int) -> tuple[Convolution, tuple[Any, ...], dict[str, Any]]:
    """Return a layer's convolution, and what it is called with."""
    x, weight = torch.randn(1, num_rows, CHANNELS).to(DTYPE).transpose(1, 2), torch.randn(CHANNELS, TAPS).to(DTYPE)
    options: dict[str, Any] = {"activation": "silu"}
    many, one = transformers_model.causal_conv1d_fn, transformers_model.causal_conv1d_update
    call = Convolution(many, one, (x, weight, None), options)
    call.allocate(num_seqs, torch.device("cpu"))
    return call, (x, weight, None), options


def medians(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median time of each call in ms; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    until = time.perf_counter() + SECONDS
    while time.perf_counter() < until or len(next(iter(times.values()))) < 5:
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def main() -> None:
    """Measure, print a table, and save the figures."""
    args = report.parser(__doc__, without=("model", "short")).parse_args()
    if not cpu.load():
        raise SystemExit("the native operations cannot be built here; the log says why")
    about = {"machine": report.machine(), "isa": cpu.isa()}
    points = []
    with torch.inference_mode():
        for name, make in {"gated delta rule": delta_rule, "causal convolution": convolution}.items():
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
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "states.json").write_bytes(orjson.dumps(about | {"points": points}, option=orjson.OPT_INDENT_2))


if __name__ == "__main__":
    main()
