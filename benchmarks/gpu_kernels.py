"""The Triton kernels on a GPU beside the floor that its memory bandwidth sets, for the layers of Llama-3.1-8B in bf16.

    python -m benchmarks.gpu_kernels

It prints the time of one call of LoRA and of decode attention, with cold caches, beside the time in which the card
would read and write the same bytes once. Keep the output in docs/triton.md, with the card's name and the date. It was
written without a GPU and has not run on one yet.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch

from lora_kernels import ops

DEVICE, DTYPE = "cuda", torch.bfloat16
LAYER = ((4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,)))
"""Input width and output widths of each set of sibling layers."""
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


def graph_seconds(step: Callable[[], object], repeats: int = 20) -> float:
    """Return the seconds of one step inside a CUDA graph, where launches cost what they cost in serving."""

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
    """Times steps that find none of their data in the L2 cache, as each layer of a forward pass does."""

    def __init__(self) -> None:
        """Measure the bandwidth of copies, and what emptying the cache costs."""
        self.other = torch.empty(1 << 28, dtype=torch.int8, device=DEVICE)
        self.flush_s = graph_seconds(self.other.zero_)
        source = torch.empty(1 << 30, dtype=torch.int8, device=DEVICE)
        target = torch.empty_like(source)
        self.bytes_per_s = 2 * source.nbytes / graph_seconds(lambda: target.copy_(source), repeats=3)

    def line(self, name: str, step: Callable[[], object], num_bytes: int) -> str:
        """Measure a step; return its time beside that of moving `num_bytes` once."""

        def flushed() -> None:
            self.other.zero_()
            step()

        measured_s = graph_seconds(flushed) - self.flush_s
        return f"{name}: {measured_s * 1e6:.1f} us, floor {num_bytes / self.bytes_per_s * 1e6:.1f} us"


def randn(*shape: int) -> torch.Tensor:
    """Return normal numbers in bf16 on the device."""
    return torch.randn(*shape, device=DEVICE).to(DTYPE)


def lora_line(watch: Stopwatch, num_tokens: int, num_adapters: int, rank: int, k: int, widths: tuple[int, ...]) -> str:
    """Time `lora_add_` on one set of sibling layers; the tokens' adapters are in order."""
    pages_each = -(-rank // ops.PAGE_ROWS)
    rows = num_adapters * pages_each * ops.PAGE_ROWS
    host = ops.AdapterTable(
        ranks=torch.full((num_adapters, len(widths)), rank, dtype=torch.int32),
        scales=torch.full((num_adapters, len(widths)), 0.01),
        pages=torch.randperm(num_adapters * pages_each).view(num_adapters, 1, pages_each).int(),
    )
    table = ops.AdapterTable(host.ranks.to(DEVICE), host.scales.to(DEVICE), host.pages.to(DEVICE), host=host)
    sites = [ops.LoraSite(i, 0, randn(rows, k), randn(rows, n)) for i, n in enumerate(widths)]
    batch = ops.build_lora_batch(np.arange(num_tokens) * num_adapters // num_tokens, DEVICE)
    assert batch is not None
    x, outs = randn(num_tokens, k), [randn(num_tokens, n) for n in widths]

    def step() -> None:
        ops.lora_add_(outs, x, sites, table, batch, impl="triton")

    weights = num_adapters * rank * (len(widths) * k + sum(widths))
    num_bytes = 2 * (weights + num_tokens * (k + 2 * sum(widths)))
    return watch.line(f"LoRA {k} -> {widths}, rank {rank}, {num_tokens} rows of {num_adapters}", step, num_bytes)


def attention_line(watch: Stopwatch, num_seqs: int, kv_len: int) -> str:
    """Time the attention of `num_seqs` decodes, each over `kv_len` keys."""
    max_blocks = -(-kv_len // ops.BLOCK_TOKENS)
    tables = np.random.default_rng(0).permutation(num_seqs * max_blocks).reshape(num_seqs, max_blocks)
    batch = ops.build_attention_batch(np.ones(num_seqs, np.int64), np.full(num_seqs, kv_len), tables, DEVICE)
    caches = [randn(num_seqs * max_blocks, KV_HEADS, ops.BLOCK_TOKENS, HEAD_DIM) for _ in range(2)]
    q = randn(num_seqs, HEADS, HEAD_DIM)

    def step() -> None:
        ops.paged_attention(q, caches[0], caches[1], batch, scale=HEAD_DIM**-0.5, impl="triton")

    return watch.line(f"attention, {num_seqs} x {kv_len} keys", step, 2 * 2 * num_seqs * kv_len * KV_HEADS * HEAD_DIM)


def main() -> None:
    """Print the time of every case beside its floor."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("a CUDA device is needed")
    watch = Stopwatch()
    print(f"{torch.cuda.get_device_name()}, copies at {watch.bytes_per_s / 1e9:.0f} GB/s")
    for num_tokens, num_adapters in ((1, 1), (32, 1), (32, 8), (32, 32), (256, 32), (4096, 1), (4096, 8)):
        for rank in (16, 64):
            for k, widths in LAYER:
                print(lora_line(watch, num_tokens, num_adapters, rank, k, widths))
    for num_seqs, kv_len in ((1, 1000), (1, 32000), (32, 1000), (32, 8000), (256, 1000)):
        print(attention_line(watch, num_seqs, kv_len))


if __name__ == "__main__":
    main()
