"""Workloads for kernel tests: adapter mixes as in Punica's benchmark, and packed sequences in a paged cache.

Everything that an operation must not read is NaN: pool rows past an adapter's rank, free pages, cache slots past a
sequence's length, uninitialized memory. So a right answer was computed from the right rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import kv_codes, ops
from lora_kernels.ops import BLOCK_TOKENS, PAGE_ROWS, AdapterTable, AttentionBatch, LoraBatch, LoraSite

Distribution = Literal["identical", "distinct", "uniform", "zipf", "skewed", "some base", "none"]
DISTRIBUTIONS: tuple[Distribution, ...] = ("identical", "distinct", "uniform", "zipf", "skewed", "some base")
RANKS: tuple[int, ...] = (1, 3, 8, 16, 48, 64, 128, 256)

# Relative and absolute error allowed for an implementation against fp32 on the same inputs, for outputs of order 1.
# fp32: sums of a few hundred to a few thousand products, with errors growing with the root of the count: 2^-24 * 64 ~
# 4e-6. fp16, bf16: one rounding of the output (2^-11, 2^-9), and one of the hidden vector if it is stored in 16 bits,
# whose errors average out over the rank: at most the same again.
TOLERANCES = {torch.float32: (1e-5, 2e-5), torch.float16: (2e-3, 4e-3), torch.bfloat16: (1.6e-2, 3.2e-2)}


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Compare with an fp32 answer, using the tolerance of the dtype of the computation."""
    rtol, atol = TOLERANCES[dtype or actual.dtype]
    torch.testing.assert_close(actual.float(), expected.float(), rtol=rtol, atol=atol)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Make torch fill uninitialized tensors with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def token_slots(distribution: Distribution, num_tokens: int, num_slots: int, seed: int = 0) -> np.ndarray:
    """Return the adapter slot of each token, -1 for the base model, in unsorted order."""
    rng = np.random.default_rng(seed)
    if distribution == "none":
        return np.full(num_tokens, -1)
    if distribution == "identical":
        return np.full(num_tokens, num_slots - 1)
    if distribution == "distinct":
        return rng.permutation(num_slots)[np.arange(num_tokens) % num_slots]
    if distribution == "zipf":
        weights = 1.0 / np.arange(1, num_slots + 1) ** 1.2
        return rng.choice(num_slots, num_tokens, p=weights / weights.sum())
    if distribution == "skewed":
        # Group sizes grow geometrically, as in Punica's benchmark.
        ends = np.cumsum(1.5 ** np.arange(num_slots))
        return rng.permutation(np.searchsorted(ends / ends[-1], (np.arange(num_tokens) + 0.5) / num_tokens))
    slots = rng.integers(0, num_slots, num_tokens)
    return np.where(rng.random(num_tokens) < 0.5, -1, slots) if distribution == "some base" else slots


@dataclass(slots=True)
class LoraCase:
    """One call of lora_add_ and its fp32 answer."""

    outs: list[Tensor]
    x: Tensor
    sites: list[LoraSite]
    table: AdapterTable
    batch: LoraBatch

    def run(self, impl: ops.Impl) -> list[Tensor]:
        """Return the outputs of an implementation, computed on copies."""
        outs = [out.clone() for out in self.outs]
        with poisoned_memory():
            ops.lora_add_(outs, self.x, self.sites, self.table, self.batch, impl=impl)
        return outs

    def expected(self) -> list[Tensor]:
        """Return the reference's answer on the same numbers in fp32. Asserts that the adapters change something."""
        outs = [out.to(torch.float32, copy=True) for out in self.outs]
        sites = [LoraSite(s.index, s.group, s.a_rows.float(), s.b_rows.float(), s.factors) for s in self.sites]
        ops.lora_add_(outs, self.x.float(), sites, self.table, self.batch, impl="reference")
        changes = [(after - before.float()).abs().amax() for after, before in zip(outs, self.outs, strict=True)]
        assert max(changes) > 0.1, "the adapters must change the answer, or a kernel that does nothing would pass"
        return outs


def in_int8(case: LoraCase) -> LoraCase:
    """Return the case with int8 rows; the factors of unused rows are NaN."""
    sites: list[LoraSite] = []
    for site in case.sites:
        largest = site.a_rows.float().abs().amax(1) * site.b_rows.float().abs().amax(1)
        a, b = ((127 * F.normalize(rows.float(), torch.inf, 1)).nan_to_num(99) for rows in (site.a_rows, site.b_rows))
        a, b = a.round().to(torch.int8), b.round().to(torch.int8)
        sites.append(LoraSite(site.index, site.group, a, b, largest / 127**2))
    return LoraCase(case.outs, case.x, sites, case.table, case.batch)


def lora_case(
    slots: np.ndarray,
    ranks: list[int],
    k: int,
    widths: tuple[int, ...],
    dtype: torch.dtype,
    *,
    row_scales: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> LoraCase:
    """Return a case with adapters of the given ranks, one per slot, on sibling sites of the given output widths.

    The sites are in two page groups. If there are several, every adapter but the first leaves one unchanged. Pages are
    scattered.
    """
    generator = torch.Generator().manual_seed(seed)
    num_sites, num_slots, max_pages = len(widths), len(ranks), -(-max(ranks) // PAGE_ROWS)
    site_ranks = torch.tensor(ranks, dtype=torch.int32)[:, None].repeat(1, num_sites + 2)
    if num_sites > 1:
        site_ranks[torch.arange(1, num_slots), 1 + torch.arange(1, num_slots) % num_sites] = 0
    num_pages = num_slots * max_pages + 3
    pages = torch.stack([torch.randperm(num_pages, generator=generator)[: num_slots * max_pages] for _ in range(2)])
    table = AdapterTable(
        ranks=site_ranks,
        scales=torch.rand(num_slots, num_sites + 2, generator=generator) + 0.5,
        pages=pages.view(2, num_slots, max_pages).transpose(0, 1).to(torch.int32).contiguous(),
    )
    sites = [_site(table, 1 + i, i % 2, num_pages, k, n, dtype, generator) for i, n in enumerate(widths)]
    scales = np.random.default_rng(seed).uniform(0.5, 2.0, len(slots)).astype(np.float32) if row_scales else None
    batch = ops.build_lora_batch(slots, device, scales)
    assert batch is not None
    x = torch.randn(len(slots), k, generator=generator).to(dtype)
    outs = [torch.randn(len(slots), n, generator=generator).to(dtype) for n in widths]
    table = AdapterTable(table.ranks.to(device), table.scales.to(device), table.pages.to(device), host=table)
    sites = [LoraSite(s.index, s.group, s.a_rows.to(device), s.b_rows.to(device)) for s in sites]
    return LoraCase([out.to(device) for out in outs], x.to(device), sites, table, batch)


def _site(
    table: AdapterTable,
    index: int,
    group: int,
    num_pages: int,
    k: int,
    n: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> LoraSite:
    a_rows = torch.full((num_pages * PAGE_ROWS, k), torch.nan)
    b_rows = torch.full((num_pages * PAGE_ROWS, n), torch.nan)
    for slot, rank in enumerate(table.ranks[:, index].tolist()):
        rank_rows = torch.arange(rank)
        rows = table.pages[slot, group].long()[rank_rows // PAGE_ROWS] * PAGE_ROWS + rank_rows % PAGE_ROWS
        a_rows[rows] = torch.randn(rank, k, generator=generator) / k**0.5
        b_rows[rows] = torch.randn(rank, n, generator=generator) / max(rank, 1) ** 0.5
    return LoraSite(index, group, a_rows.to(dtype), b_rows.to(dtype))


class AttentionOptions(TypedDict, total=False):
    """Optional features of an attention case."""

    window: int
    softcap: float
    sinks: bool


class AttentionLogits(TypedDict):
    """Keyword arguments of paged_attention."""

    scale: float
    window: int
    softcap: float
    sinks: Tensor | None


@dataclass(slots=True)
class AttentionCase:
    """One call of paged_attention and its fp32 answer."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    batch: AttentionBatch
    logits: AttentionLogits

    def run(self, impl: ops.Impl) -> Tensor:
        with poisoned_memory():
            return ops.paged_attention(self.q, self.k_cache, self.v_cache, self.batch, impl=impl, **self.logits)

    def coded(self) -> AttentionCase:
        """Return the case over int8 caches of the same keys and values; NaN rows get NaN scales."""
        caches: list[Tensor] = []
        for cache in (self.k_cache, self.v_cache):
            width = kv_codes.row_width(cache.shape[3], torch.int8)
            coded = torch.zeros(*cache.shape[:3], width, dtype=torch.int8)
            for part, own in zip(kv_codes.parts(coded), kv_codes.encode(cache), strict=True):
                part.copy_(own)
            caches.append(coded)
        return AttentionCase(self.q, caches[0], caches[1], self.batch, self.logits)

    def expected(self) -> Tensor:
        q, k_cache, v_cache = self.q.float(), *(kv_codes.decode(c).float() for c in (self.k_cache, self.v_cache))
        return ops.paged_attention(q, k_cache, v_cache, self.batch, impl="reference", **self.logits)


def attention_case(
    query_lens: tuple[int, ...],
    kv_lens: tuple[int, ...],
    heads: tuple[int, int],
    head_dims: tuple[int, int],
    dtype: torch.dtype,
    *,
    window: int = 0,
    softcap: float = 0.0,
    sinks: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> AttentionCase:
    """Return sequences over scattered cache blocks. heads: of queries, of keys. head_dims: of keys, of values."""
    generator = torch.Generator().manual_seed(seed)
    num_blocks = [-(-length // BLOCK_TOKENS) for length in kv_lens]
    order = torch.randperm(sum(num_blocks), generator=generator).numpy()
    # Block 0 is free; the tables contain it after the blocks of each sequence.
    tables = np.zeros((len(kv_lens), max(num_blocks) + 1), dtype=np.int32)
    caches = [torch.full((len(order) + 1, heads[1], BLOCK_TOKENS, d), torch.nan) for d in head_dims]
    for seq, (length, count) in enumerate(zip(kv_lens, num_blocks, strict=True)):
        tables[seq, :count] = 1 + order[sum(num_blocks[:seq]) :][:count]
        for cache in caches:
            entries = torch.randn(length, heads[1], cache.shape[3], generator=generator)
            positions = torch.arange(length)
            blocks = torch.from_numpy(tables[seq]).long()[positions // BLOCK_TOKENS]
            cache[blocks, :, positions % BLOCK_TOKENS] = entries
    batch = ops.build_attention_batch(np.array(query_lens), np.array(kv_lens), tables, device)
    q = torch.randn(sum(query_lens), heads[0], head_dims[0], generator=generator)
    sink_logits = torch.randn(heads[0], generator=generator).to(device, dtype) if sinks else None
    logits: AttentionLogits = {
        "scale": head_dims[0] ** -0.5,
        "window": window,
        "softcap": softcap,
        "sinks": sink_logits,
    }
    q, k_cache, v_cache = (tensor.to(device, dtype) for tensor in (q, *caches))
    return AttentionCase(q, k_cache, v_cache, batch, logits)
