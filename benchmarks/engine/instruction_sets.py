"""The native operations by instruction set, alternately: bf16 and quantized products, attention, LoRA.

    python -m benchmarks.engine.instruction_sets [--sets avx512_bf16,amx_bf16] [--rows 1,8,32] [--threads N]

By default it measures all instruction sets of this processor, the lowest first. Products have six layers of 8,192 x
2,048, with torch's bf16 product for comparison. Attention is of one prompt, and of 32 decodes over 128 keys, with nine
heads that share three KV heads. LoRA is one adapter of rank 16 on a product of 2,048 x 8,192. Times are lower quartiles
of alternating calls. Ratios are to the set below: medians over rounds, each of which runs all sets once. The run takes
some minutes, on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.common import report
from lora_kernels import cpu, ops
from lora_kernels.quantised import Kind, QuantisedWeight, row_bytes

K, N = 2048, 8192
ROWS = "1,8,32,128,512"
PRODUCTS: tuple[tuple[Kind, bool], ...] = (
    ("q4_0", False), ("q4_k", False), ("q8_0", False), ("q6_k", False), ("q8_0", True)
)  # fmt: skip
"""Kinds of quantized weights, and whether inputs are rounded to int8 codes."""
PROMPTS = (512, 4096)
HEADS, KV_HEADS, HEAD_DIM, RANK = 9, 3, 64, 16
ROUNDS = 9
LAYERS = 6


def randn(*shape: int) -> torch.Tensor:
    """Return normally distributed bf16 numbers."""
    return torch.randn(*shape).to(torch.bfloat16)


def in_turns(
    call: Callable[[], object], sets: list[str], beside: Callable[[], object] | None = None
) -> tuple[list[float], list[float]]:
    """Return a call's seconds by instruction set, then those of `beside`, if given; and the ratios to the set below.

    Seconds are lower quartiles, ratios are medians over rounds: above 1, a set is faster than the previous one.
    """
    times: dict[str, list[float]] = {}
    for number in range(ROUNDS + 1):
        for name in [*sets, *(["torch"] if beside else [])]:
            if name != "torch":
                cpu.set_isa(name)
            begin = time.perf_counter()
            beside() if beside and name == "torch" else call()
            if number:
                times.setdefault(name, []).append(time.perf_counter() - begin)
    faster = [np.median(np.divide(times[below], times[own])) for below, own in itertools.pairwise(sets)]
    return [sorted(own)[len(own) // 4] for own in times.values()], [float(ratio) for ratio in faster]


def products(x: torch.Tensor, layers: list[ops.PackedLinear] | list[ops.QuantisedLinear]) -> None:
    """Multiply rows by all layers."""
    for layer in layers:
        ops.linear(x, layer)


def torchs(x: torch.Tensor, weights: list[torch.Tensor]) -> None:
    """Multiply rows by all weights with torch."""
    for weight in weights:
        F.linear(x, weight)


def attention(tokens: int) -> Callable[[], object]:
    """Return a call that computes the attention of one prompt."""
    blocks = tokens // ops.BLOCK_TOKENS
    batch = ops.build_attention_batch(np.array([tokens]), np.array([tokens]), np.arange(blocks)[None], "cpu")
    k, v = (randn(blocks, KV_HEADS, ops.BLOCK_TOKENS, HEAD_DIM) for _ in range(2))
    return partial(ops.paged_attention, randn(tokens, HEADS, HEAD_DIM), k, v, batch, scale=HEAD_DIM**-0.5)


def decodes(num: int, keys: int) -> Callable[[], object]:
    """Return a call that computes the attention of the next tokens of `num` sequences."""
    blocks = keys // ops.BLOCK_TOKENS
    tables = np.arange(num * blocks).reshape(num, blocks)
    batch = ops.build_attention_batch(np.ones(num, int), np.full(num, keys), tables, "cpu")
    k, v = (randn(num * blocks, KV_HEADS, ops.BLOCK_TOKENS, HEAD_DIM) for _ in range(2))
    return partial(ops.paged_attention, randn(num, HEADS, HEAD_DIM), k, v, batch, scale=HEAD_DIM**-0.5)


def lora(tokens: int) -> Callable[[], object]:
    """Return a call that applies one adapter to all rows."""
    one = torch.ones(1, 1, dtype=torch.int32)
    table = ops.AdapterTable(one * RANK, torch.ones(1, 1), torch.zeros(1, 1, 1, dtype=torch.int32))
    site = ops.LoraSite(0, 0, randn(ops.PAGE_ROWS, K), randn(ops.PAGE_ROWS, N))
    batch = ops.build_lora_batch(np.zeros(tokens, int), "cpu")
    assert batch is not None
    return partial(ops.lora_add_, [randn(tokens, N)], randn(tokens, K), [site], table, batch)


def main() -> None:
    """Measure, print tables, and save the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the JSON file (%(default)s)")
    parser.add_argument("--sets", default="", help="instruction sets, the lowest first (all that are here)")
    parser.add_argument("--rows", default=ROWS, help="of products and LoRA (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(%(default)s)")
    args = parser.parse_args()
    if not cpu.load():
        raise SystemExit("the native operations cannot be built here; the log says why")
    torch.set_num_threads(args.threads)
    sets, machine = args.sets.split(",") if args.sets else cpu.isas()[::-1], report.machine()
    all_rows = [int(rows) for rows in args.rows.split(",")]
    points: list[tuple[str, float, list[float], list[float]]] = []  # operation, GFLOP, seconds and ratios of in_turns
    with torch.inference_mode():
        weights = [randn(N, K) for _ in range(LAYERS)]
        packed = [ops.pack_linear(weight) for weight in weights]
        for rows in all_rows:
            x, work = randn(rows, K), 2e-9 * rows * K * N * LAYERS
            times = in_turns(partial(products, x, packed), sets, partial(torchs, x, weights))
            points.append((f"product in bf16, {rows} rows", work, *times))
        for kind, int8_inputs in PRODUCTS:
            blocks = torch.randint(0, 256, (N, row_bytes(kind, K)), dtype=torch.uint8)
            layers = [
                dataclasses.replace(ops.pack_quantised([QuantisedWeight(kind, blocks, K)]), int8_inputs=int8_inputs)
                for _ in range(LAYERS)
            ]
            for rows in all_rows:
                what, work = f"{kind}{', int8 inputs' * int8_inputs}, {rows} rows", 2e-9 * rows * K * N * LAYERS
                points.append((what, work, *in_turns(partial(products, randn(rows, K), layers), sets)))
        for tokens in PROMPTS:
            work = 2e-9 * tokens**2 * HEADS * HEAD_DIM
            points.append((f"attention of {tokens} tokens", work, *in_turns(attention(tokens), sets)))
        work = 4e-9 * 32 * 128 * HEADS * HEAD_DIM
        points.append(("attention of 32 decodes", work, *in_turns(decodes(32, 128), sets)))
        for rows in all_rows:
            points.append((f"LoRA, {rows} rows", 2e-9 * rows * RANK * (K + N), *in_turns(lora(rows), sets)))
    columns = [*sets, "torch"]
    print(report.table(
        ("operation", *(f"{name}, ms" for name in columns), *(f"{name} over below" for name in sets[1:])),
        [(what, *(f"{1e3 * t:.2f}" for t in times), *([""] * (len(columns) - len(times))),
          *(f"{ratio:.2f}" for ratio in ratios)) for what, _, times, ratios in points],
    ))  # fmt: skip
    found = [{"operation": what, "gflop": work, "seconds": dict(zip(columns, times, strict=False)),
              "over_the_set_below": dict(zip(sets[1:], ratios, strict=True))}
             for what, work, times, ratios in points]  # fmt: skip
    report.save(args.out / "instruction-sets", {"machine": machine, "threads": args.threads, "points": found})


if __name__ == "__main__":
    main()
