"""LoRA and decode attention compared with the floor set by memory bandwidth, for the layers of a model.

A call is timed with cold caches inside a CUDA graph, where launches cost the same as in serving. Its floor is the time
in which the card reads and writes the same bytes once. On a CPU, which serves only to test the benchmark itself, calls
are timed without these measures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.shapes import Shape
from lora_kernels import ops


@dataclass(frozen=True, slots=True)
class Timed:
    """One timed call and its floor."""

    name: str
    kind: str  # "lora" or "attention"
    is_decode: bool  # whether it counts for the target of decode bandwidth
    us: float
    floor_us: float

    @property
    def bandwidth_share(self) -> float:
        """The share of the copy bandwidth that the call reaches."""
        return self.floor_us / self.us


def host_seconds(step: Callable[[], object], repeats: int = 5) -> float:
    """Return the seconds of one step, by the host's clock."""
    step()
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - started) / repeats


def graph_seconds(step: Callable[[], object], repeats: int = 20) -> float:
    """Return the seconds of one step inside a CUDA graph, where launches cost the same as in serving."""

    def many() -> None:
        for _ in range(repeats):
            step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        many()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        many()
    graph.replay()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(5):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / 5 / repeats


class Stopwatch:
    """Times steps whose data are not in the L2 cache, as for each layer of a forward pass."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """Measure the copy bandwidth, and the time to flush the cache. dtype: of `randn`."""
        on_gpu = device.type == "cuda"
        self.device, self.dtype = device, dtype
        self.seconds = graph_seconds if on_gpu else host_seconds
        self.other = torch.empty(1 << (28 if on_gpu else 16), dtype=torch.int8, device=device)
        self.flush_s = self.seconds(self.other.zero_)
        source = torch.empty(1 << (30 if on_gpu else 24), dtype=torch.int8, device=device)
        target = torch.empty_like(source)
        self.bytes_per_s = 2 * source.nbytes / self.seconds(lambda: target.copy_(source), 3)

    def time(self, name: str, kind: str, step: Callable[[], object], num_bytes: int, *, is_decode: bool) -> Timed:
        """Measure a step; return its time, and that of moving `num_bytes` once."""

        def flushed() -> None:
            self.other.zero_()
            step()

        seconds = max(self.seconds(flushed) - self.flush_s, 1e-9)
        return Timed(name, kind, is_decode, seconds * 1e6, num_bytes / self.bytes_per_s * 1e6)

    def randn(self, *shape: int) -> torch.Tensor:
        """Return normally distributed numbers on the device."""
        return torch.randn(*shape, device=self.device).to(self.dtype)


def time_lora(
    watch: Stopwatch, num_tokens: int, num_adapters: int, rank: int, k: int, widths: tuple[int, ...]
) -> Timed:
    """Time `lora_add_` on one set of sibling layers; tokens are ordered by adapter."""
    pages_each = -(-rank // ops.PAGE_ROWS)
    rows = num_adapters * pages_each * ops.PAGE_ROWS
    host = ops.AdapterTable(
        ranks=torch.full((num_adapters, len(widths)), rank, dtype=torch.int32),
        scales=torch.full((num_adapters, len(widths)), 0.01),
        pages=torch.randperm(num_adapters * pages_each).view(num_adapters, 1, pages_each).int(),
    )
    device = watch.device
    table = ops.AdapterTable(host.ranks.to(device), host.scales.to(device), host.pages.to(device), host=host)
    sites = [ops.LoraSite(i, 0, watch.randn(rows, k), watch.randn(rows, n)) for i, n in enumerate(widths)]
    batch = ops.build_lora_batch(np.arange(num_tokens) * num_adapters // num_tokens, device)
    assert batch is not None
    x, outs = watch.randn(num_tokens, k), [watch.randn(num_tokens, n) for n in widths]

    def step() -> None:
        ops.lora_add_(outs, x, sites, table, batch)

    weights = num_adapters * rank * (len(widths) * k + sum(widths))
    num_bytes = watch.dtype.itemsize * (weights + num_tokens * (k + 2 * sum(widths)))
    name = f"{k} → {' + '.join(map(str, widths))}, rank {rank}, {num_tokens} rows of {num_adapters}"
    return watch.time(name, "lora", step, num_bytes, is_decode=num_tokens <= 256)


def time_attention(watch: Stopwatch, heads: tuple[int, int, int], num_seqs: int, kv_len: int) -> Timed:
    """Time the attention of `num_seqs` decodes over `kv_len` keys each. heads: query heads, KV heads, head size."""
    num_heads, num_kv_heads, size = heads
    max_blocks = -(-kv_len // ops.BLOCK_TOKENS)
    tables = np.random.default_rng(0).permutation(num_seqs * max_blocks).reshape(num_seqs, max_blocks)
    batch = ops.build_attention_batch(
        np.ones(num_seqs, np.int64), np.full(num_seqs, kv_len), tables.astype(np.int32), watch.device
    )
    caches = [watch.randn(num_seqs * max_blocks, num_kv_heads, ops.BLOCK_TOKENS, size) for _ in range(2)]
    q = watch.randn(num_seqs, num_heads, size)

    def step() -> None:
        ops.paged_attention(q, caches[0], caches[1], batch, scale=size**-0.5)

    num_bytes = 2 * watch.dtype.itemsize * num_seqs * kv_len * num_kv_heads * size
    return watch.time(f"{num_seqs} x {kv_len} keys", "attention", step, num_bytes, is_decode=True)


def cases(shape: Shape, watch: Stopwatch) -> Iterator[Timed]:
    """Time every case of a model's layers."""
    config, is_tiny = shape.config, shape.name.startswith("a tiny")
    width, inner = config["hidden_size"], config["intermediate_size"]
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = width // num_heads
    layers = (
        (width, (width, num_kv_heads * size, num_kv_heads * size)),
        (width, (width,)),
        (width, (inner, inner)),
        (inner, (width,)),
    )
    rows = ((1, 1), (4, 4)) if is_tiny else ((1, 1), (32, 1), (32, 8), (32, 32), (256, 32), (4096, 1), (4096, 8))
    for num_tokens, num_adapters in rows:
        for rank in (16, 64):
            for k, widths in layers:
                yield time_lora(watch, num_tokens, num_adapters, rank, k, widths)
    keys = ((2, 40),) if is_tiny else ((1, 1000), (1, 32_000), (32, 1000), (32, 8000), (256, 1000))
    for num_seqs, kv_len in keys:
        yield time_attention(watch, (num_heads, num_kv_heads, size), num_seqs, kv_len)


def run(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Return the time of every case beside its floor."""
    watch = Stopwatch(device, shape.dtype)
    timed = list(cases(shape, watch))
    shares = [one.bandwidth_share for one in timed if one.is_decode]
    return {
        "copy_gb_s": watch.bytes_per_s / 1e9,
        "cases": [asdict(one) | {"bandwidth_share": one.bandwidth_share} for one in timed],
        "decode_bandwidth_share_median": float(np.median(shares)),
        "decode_bandwidth_share_least": min(shares),
    }
