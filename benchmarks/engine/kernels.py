"""The CPU kernels compared with the floors set by memory and arithmetic, for the shapes of SmolLM2-135M in bf16.

    python -m benchmarks.engine.kernels

Each figure is the time of one operation in a whole step: all 30 layers, each with its own weights, so that these come
from memory as in serving. It is the lower quartile of repetitions. The machine should be idle otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import report
from lora_kernels import ops

LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY = 30, 576, 1536, 49152
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
QKV = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
SITES = ((HIDDEN, QKV), (HIDDEN, (HIDDEN,)), (HIDDEN, (INTERMEDIATE, INTERMEDIATE)), (INTERMEDIATE, (HIDDEN,)))
"""Input width and output widths of each set of sibling layers."""
DTYPE = torch.bfloat16


@dataclass
class Row:
    """A measurement: the time of an operation in a step, and the floor of the same work."""

    operation: str
    case: str
    ms: float
    bytes: int  # read from memory
    flops: int
    torch_ms: float | None = None
    floor_ms: float = 0.0


def milliseconds(run: Callable[[], object], repetitions: int) -> float:
    """Return the lower quartile of the times of `run` in ms, after two unmeasured runs."""
    for _ in range(2):
        run()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[len(times) // 4]


def randn(*shape: int) -> Tensor:
    """Return normally distributed bf16 numbers."""
    return torch.randn(*shape).to(DTYPE)


def memory_gb_s() -> float:
    """Return the read bandwidth of all threads in GB/s: a product of one row with a weight larger than the caches."""
    weight = ops.pack_linear(randn(VOCABULARY * 4, HIDDEN))
    x = randn(1, HIDDEN)
    return weight.weight.nbytes / milliseconds(lambda: ops.linear(x, weight), 20) / 1e6


def peak_gflops() -> float:
    """Return the arithmetic rate in GFLOP/s of a product whose operands are in the caches."""
    weight, x = ops.pack_linear(randn(512, 512)), randn(1024, 512)
    return 2 * 1024 * 512 * 512 / milliseconds(lambda: ops.linear(x, weight), 50) / 1e6


def linear_rows() -> list[Row]:
    """Measure the linear layers at several batch sizes, and torch for comparison."""
    weights = [[randn(sum(widths), k) / k**0.5 for k, widths in SITES] for _ in range(LAYERS)]
    packed = [[ops.pack_linear(weight) for weight in layer] for layer in weights]
    elements = sum(weight.numel() for layer in weights for weight in layer)
    rows = []
    for m in (1, 8, 32, 64, 256, 512):
        inputs = [randn(m, k) for k, _ in SITES]

        def native(inputs: list[Tensor] = inputs) -> None:
            for layer in packed:
                for x, weight in zip(inputs, layer, strict=True):
                    ops.linear(x, weight)

        def torchs(inputs: list[Tensor] = inputs) -> None:
            for layer in weights:
                for x, weight in zip(inputs, layer, strict=True):
                    F.linear(x, weight)

        repetitions = 25 if m < 256 else 8
        row = Row("linear", f"{m} rows", milliseconds(native, repetitions), 2 * elements, 2 * m * elements)
        row.torch_ms = milliseconds(torchs, repetitions)
        rows.append(row)
    return rows


def adapters(num_slots: int, rank: int) -> tuple[list[list[list[ops.LoraSite]]], ops.AdapterTable]:
    """Return a pool of `num_slots` adapters of one rank on every linear layer: sites by layer and input, and table."""
    pages_each = -(-rank // ops.PAGE_ROWS)
    pool_rows = num_slots * pages_each * ops.PAGE_ROWS
    num_sites = sum(len(widths) for _, widths in SITES)
    table = ops.AdapterTable(
        ranks=torch.full((num_slots, num_sites), rank, dtype=torch.int32),
        scales=torch.full((num_slots, num_sites), 0.01),
        pages=torch.randperm(num_slots * pages_each).view(num_slots, 1, pages_each).int(),
    )
    layers = []
    for _ in range(LAYERS):
        index, layer = 0, []
        for k, widths in SITES:
            sites = [ops.LoraSite(index + i, 0, randn(pool_rows, k), randn(pool_rows, n)) for i, n in enumerate(widths)]
            layer.append(sites)
            index += len(widths)
        layers.append(layer)
    return layers, table


def lora_row(case: str, slots: np.ndarray, rank: int) -> Row:
    """Measure `lora_add_` on a batch. slots: the adapter of each token, int [num_tokens]."""
    layers, table = adapters(int(slots.max()) + 1, rank)
    batch = ops.build_lora_batch(slots, "cpu")
    assert batch is not None
    inputs = [randn(len(slots), k) for k, _ in SITES]
    outputs = [[randn(len(slots), n) for n in widths] for _, widths in SITES]

    def step() -> None:
        for layer in layers:
            for outs, x, sites in zip(outputs, inputs, layer, strict=True):
                ops.lora_add_(outs, x, sites, table, batch)

    entries = LAYERS * rank * sum(k + n for k, widths in SITES for n in widths)
    num_adapters = len(set(slots.tolist()) - {-1})
    flops = 2 * entries * int((slots >= 0).sum())
    return Row("lora_add_", case, milliseconds(step, 15), 2 * entries * num_adapters, flops)


def lora_rows() -> list[Row]:
    """Measure `lora_add_` on several mixes of adapters."""
    return [
        lora_row("1 row, 1 adapter", np.zeros(1, int), 16),
        lora_row("32 rows, 1 adapter", np.zeros(32, int), 16),
        lora_row("32 rows, 32 adapters", np.arange(32), 16),
        lora_row("32 rows, 32 adapters of rank 64", np.arange(32), 64),
        lora_row("512 rows, 1 adapter", np.zeros(512, int), 16),
        lora_row("512 rows, 8 adapters", np.repeat(np.arange(8), 64), 16),
    ]


def attention_row(case: str, query_lens: Sequence[int], kv_lens: Sequence[int]) -> Row:
    """Measure the attention of sequences with these numbers of queries and keys."""
    queries, keys = np.array(query_lens), np.array(kv_lens)
    max_blocks = -(-int(keys.max()) // ops.BLOCK_TOKENS)
    num_blocks = len(keys) * max_blocks
    tables = np.random.default_rng(0).permutation(num_blocks).reshape(len(keys), max_blocks)
    batch = ops.build_attention_batch(queries, keys, tables, "cpu")
    shape = (num_blocks, KV_HEADS, ops.BLOCK_TOKENS, HEAD_DIM)
    caches = [(randn(*shape), randn(*shape)) for _ in range(LAYERS)]
    q = randn(batch.num_tokens, HEADS, HEAD_DIM)

    def step() -> None:
        for k_cache, v_cache in caches:
            ops.paged_attention(q, k_cache, v_cache, batch, scale=HEAD_DIM**-0.5)

    pairs = int((queries * (keys - queries) + queries * (queries + 1) // 2).sum())
    return Row(
        "paged_attention",
        case,
        milliseconds(step, 15),
        bytes=int(keys.sum()) * KV_HEADS * HEAD_DIM * 2 * 2 * LAYERS,
        flops=4 * pairs * HEADS * HEAD_DIM * LAYERS,
    )


def attention_rows() -> list[Row]:
    """Measure the attention of decodes, prompts and a chunk of a prompt."""
    return [
        attention_row("1 decode, 128 keys", [1], [128]),
        attention_row("32 decodes, 128 keys", [1] * 32, [128] * 32),
        attention_row("8 decodes, 2048 keys", [1] * 8, [2048] * 8),
        attention_row("1 decode, 8192 keys", [1], [8192]),
        attention_row("6 prompts of 80", [80] * 6, [80] * 6),
        attention_row("chunk of 512 up to 2048", [512], [2048]),
    ]


def pointwise_rows(m: int) -> list[Row]:
    """Measure the pointwise operations on `m` rows."""
    x, residual, weight = randn(m, HIDDEN), randn(m, HIDDEN), randn(HIDDEN)
    gate, up = randn(m, 2 * INTERMEDIATE).chunk(2, dim=1)
    q, k, cos = randn(m, HEADS, HEAD_DIM), randn(m, KV_HEADS, HEAD_DIM), torch.rand(m, HEAD_DIM).to(DTYPE)

    def row(name: str, run: Callable[[], object], calls_per_layer: int) -> Row:
        calls = range(calls_per_layer * LAYERS)
        return Row(name, f"{m} rows", milliseconds(lambda: [run() for _ in calls], 25), bytes=0, flops=0)

    return [
        row("rms_norm", lambda: ops.rms_norm(x, weight, 1e-5, residual=residual), 2),
        row("gated_act", lambda: ops.gated_act(gate, up), 1),
        row("rotary_", lambda: ops.rotary_(q, k, cos, cos), 1),
    ]


def main() -> None:
    """Measure all operations, print a table, and save the figures."""
    args = report.parser(__doc__, without=("model", "short")).parse_args()
    torch.manual_seed(0)
    about = report.native_machine()
    bandwidth, peak = memory_gb_s(), peak_gflops()
    rows = [*linear_rows(), *lora_rows(), *attention_rows()]
    rows += [row for m in (1, 32, 512) for row in pointwise_rows(m)]
    print(f"{about['isa']}, {about['threads']} threads, load {about['machine']['load_average_before']} before")
    print(f"memory {bandwidth:.0f} GB/s, arithmetic {peak:.0f} GFLOP/s")
    for row in rows:
        row.floor_ms = max(row.bytes / bandwidth, row.flops / peak) / 1e6
    cells = [
        (r.operation, r.case, f"{r.ms:.2f}", f"{r.floor_ms:.2f}", f"{r.torch_ms:.2f}" if r.torch_ms else "")
        for r in rows
    ]
    print(report.table(("operation", "case", "ms", "floor", "torch"), cells))
    about |= {"memory_gb_s": bandwidth, "peak_gflops": peak, "rows": [asdict(row) for row in rows]}
    report.save(args.out / "kernels", about)


if __name__ == "__main__":
    main()
