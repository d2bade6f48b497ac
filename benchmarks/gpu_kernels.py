"""The Triton kernels on a GPU beside the bandwidth floor, on the layers of Llama-3.1-8B in bf16.

    python -m benchmarks.gpu_kernels

Prints the time of LoRA and of decode attention, and the time in which the same bytes could be copied once. Each step is
timed inside a CUDA graph, and finds nothing of its own in the L2 cache, as a layer does whose turn comes once a forward
pass. It has not run yet: keep what it prints in docs/triton.md, with the card's name and the date.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from lora_kernels import ops

LAYER = ((4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,)))
"""Input width and output widths of each set of sibling linear layers."""

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
DTYPE = torch.bfloat16
FLUSH_BYTES = 1 << 28

Step = tuple[Callable[[], object], int]
"""What is timed, and the bytes that it must read and write."""


def lora_step(
    num_tokens: int, num_adapters: int, rank: int, k: int, widths: tuple[int, ...], device: str, impl: ops.Impl
) -> Step:
    """Return LoRA of one rank on sibling layers, the tokens being shared evenly among adapters."""
    pages = -(-rank // ops.PAGE_ROWS)
    num_rows = num_adapters * pages * ops.PAGE_ROWS
    table = ops.AdapterTable(
        ranks=torch.full((num_adapters, len(widths)), rank, dtype=torch.int32, device=device),
        scales=torch.ones(num_adapters, len(widths), device=device),
        pages=torch.arange(num_adapters * pages, dtype=torch.int32, device=device).view(num_adapters, 1, pages),
    )
    sites = [
        ops.LoraSite(i, 0, torch.randn(num_rows, k, device=device, dtype=DTYPE) / k**0.5,
                     torch.randn(num_rows, width, device=device, dtype=DTYPE) / rank**0.5)
        for i, width in enumerate(widths)
    ]  # fmt: skip
    x = torch.randn(num_tokens, k, device=device, dtype=DTYPE)
    outs = [torch.zeros(num_tokens, width, device=device, dtype=DTYPE) for width in widths]
    batch = ops.build_lora_batch(np.arange(num_tokens) * num_adapters // num_tokens, device)
    assert batch is not None
    weights = num_adapters * rank * (len(widths) * k + sum(widths))
    num_bytes = DTYPE.itemsize * (weights + num_tokens * (k + 2 * sum(widths)))
    return lambda: ops.lora_add_(outs, x, sites, table, batch, impl=impl), num_bytes


def attention_step(num_seqs: int, kv_len: int, device: str, impl: ops.Impl) -> Step:
    """Return a decode of sequences of one length, whose blocks are scattered over the cache."""
    num_blocks = -(-kv_len // ops.BLOCK_TOKENS)
    tables = np.random.default_rng(0).permutation(num_seqs * num_blocks).reshape(num_seqs, num_blocks)
    ones = np.ones(num_seqs, np.int64)
    batch = ops.build_attention_batch(ones, kv_len * ones, tables.astype(np.int32), device)
    shape = (num_seqs * num_blocks, KV_HEADS, ops.BLOCK_TOKENS, HEAD_DIM)
    k_cache, v_cache = (torch.randn(*shape, device=device, dtype=DTYPE) for _ in range(2))
    q = torch.randn(num_seqs, HEADS, HEAD_DIM, device=device, dtype=DTYPE)
    num_bytes = 2 * DTYPE.itemsize * num_seqs * kv_len * KV_HEADS * HEAD_DIM
    return lambda: ops.paged_attention(q, k_cache, v_cache, batch, scale=HEAD_DIM**-0.5, impl=impl), num_bytes


def graph_seconds(step: Callable[[], object], repeats: int = 20) -> float:
    """Return the seconds of a step inside a CUDA graph, where launches cost what they cost in serving."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles and allocates, which a capture must not
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            step()
    graph.replay()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(5):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / 5 / repeats


class Stopwatch:
    """Times steps with an empty L2 cache, and knows the card's bandwidth."""

    def __init__(self) -> None:
        self._other = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self._flush_s = graph_seconds(self._other.zero_)
        source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
        target = torch.empty_like(source)
        self.bytes_per_s = 2 * source.nbytes / graph_seconds(lambda: target.copy_(source), repeats=3)

    def line(self, name: str, step: Step) -> str:
        """Time a step; return a line with its time and its floor."""
        run, num_bytes = step

        def flushed() -> None:
            self._other.zero_()
            run()

        measured_s = graph_seconds(flushed) - self._flush_s
        return f"{name}: {measured_s * 1e6:.1f} us, floor {num_bytes / self.bytes_per_s * 1e6:.1f} us"


def main() -> None:
    """Time every case and print a line for each."""
    watch = Stopwatch()
    print(f"{torch.cuda.get_device_name()}, copies at {watch.bytes_per_s / 1e9:.0f} GB/s")
    for num_tokens, num_adapters in ((1, 1), (32, 1), (32, 8), (32, 32), (256, 32), (4096, 1), (4096, 8)):
        for rank in (16, 64):
            for k, widths in LAYER:
                step = lora_step(num_tokens, num_adapters, rank, k, widths, "cuda", "triton")
                name = f"LoRA {k} -> {widths}, rank {rank}, {num_tokens} rows of {num_adapters}"
                print(watch.line(name, step), flush=True)
    for num_seqs, kv_len in ((1, 1000), (1, 32000), (32, 1000), (32, 8000), (256, 1000)):
        step = attention_step(num_seqs, kv_len, "cuda", "triton")
        print(watch.line(f"attention, {num_seqs} decodes over {kv_len} keys", step), flush=True)


if __name__ == "__main__":
    main()
