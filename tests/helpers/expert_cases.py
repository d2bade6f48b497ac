"""LoRA on the experts of a step's tokens, as rows of `lora_add_`, and the expected result by loops over pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from helpers.kernel_cases import poisoned_memory
from lora_kernels import ops
from lora_kernels.experts import ExpertOrder, ExpertPages, expert_batch, order_by_expert
from lora_kernels.ops import PAGE_ROWS, AdapterTable, LoraSite


@dataclass(slots=True)
class ExpertCase:
    """One layer of experts: the adapters' rows, and a step's tokens with their experts."""

    pages: ExpertPages
    first_pages: Tensor  # int32 [slots]
    expert_ids: Tensor  # int64 [T, top_k]
    slots: np.ndarray  # int32 [T]
    scales: np.ndarray  # float32 [T]
    x: Tensor  # [T, K]
    loras: dict[int, tuple[Tensor, Tensor, float]]  # by slot: A [E, rank, K], B transposed [E, rank, N], scale

    def order(self) -> ExpertOrder:
        slots = torch.from_numpy(self.slots).to(self.x.device)
        return order_by_expert(self.expert_ids, slots, self.pages.num_experts, len(self.first_pages))

    def run(self, impl: ops.Impl) -> Tensor:
        """Return what LoRA adds to zeros, for each pair of token and expert: [T, top_k, N]."""
        order = self.order()
        batch = expert_batch(order, self.pages, self.first_pages, torch.from_numpy(self.scales).to(self.x.device))
        out = self.x.new_zeros(len(order.pairs), self.pages.site.b_rows.shape[1])
        with poisoned_memory():
            ops.lora_add_([out], self.x[order.tokens], [self.pages.site], self.pages.table, batch, impl=impl)
        back = torch.empty_like(out).index_copy_(0, order.pairs, out)
        return back.view(*self.expert_ids.shape, -1)

    def expected(self) -> Tensor:
        """Return the same values, computed pair by pair in fp32 on the host."""
        num_tokens, top_k = self.expert_ids.shape
        found = torch.zeros(num_tokens, top_k, self.pages.site.b_rows.shape[1])
        for token in range(num_tokens):
            lora = self.loras.get(int(self.slots[token]))
            if lora is None:
                continue
            a, b, scale = lora
            for k, expert in enumerate(self.expert_ids[token].tolist()):
                hidden = a[expert].float() @ self.x[token].float().cpu()
                found[token, k] = hidden @ b[expert].float() * scale * float(self.scales[token])
        return found


def expert_case(
    num_tokens: int, ranks: list[int], *, num_experts: int = 6, top_k: int = 2, k: int = 40, n: int = 24,
    dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0,
) -> ExpertCase:  # fmt: skip
    """Return a case with adapters of the given ranks, one per slot; rank 0 has no rows. A third of the tokens has none.

    Pages are scattered, and rows that no adapter has written are NaN.
    """
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    nums = [-(-rank // PAGE_ROWS) for rank in ranks]
    num_pages, order = sum(nums) + 2, iter(rng.permutation(sum(nums) + 2).tolist())
    a_rows = torch.full((num_pages, num_experts, PAGE_ROWS, k), torch.nan).to(dtype)
    b_rows = torch.full((num_pages, num_experts, PAGE_ROWS, n), torch.nan).to(dtype)
    num_virtual = num_pages * num_experts + 1
    table = AdapterTable(
        torch.zeros(num_virtual, 1, dtype=torch.int32), torch.zeros(num_virtual, 1),
        torch.zeros(num_virtual, 1, max(nums), dtype=torch.int32),
    )  # fmt: skip
    firsts, loras = torch.full((len(ranks),), -1, dtype=torch.int32), {}
    for slot, (rank, num) in enumerate(zip(ranks, nums, strict=True)):
        if not rank:
            continue
        a = (torch.randn(num_experts, rank, k, generator=generator) / k**0.5).to(dtype)
        b = (torch.randn(num_experts, rank, n, generator=generator) / rank**0.5).to(dtype)
        own = [next(order) for _ in range(num)]
        for i, page in enumerate(own):
            part = slice(i * PAGE_ROWS, (i + 1) * PAGE_ROWS)
            a_rows[page, :, : a[:, part].shape[1]] = a[:, part]
            b_rows[page, :, : a[:, part].shape[1]] = b[:, part]
        at = slice(own[0] * num_experts, (own[0] + 1) * num_experts)
        table.ranks[at], table.scales[at] = rank, 0.5 + slot
        table.pages[at, 0, :num] = (
            torch.tensor(own, dtype=torch.int32) * num_experts + torch.arange(num_experts)[:, None]
        )
        firsts[slot] = own[0]
        loras[slot] = (a, b, 0.5 + slot)
    table = AdapterTable(table.ranks.to(device), table.scales.to(device), table.pages.to(device))
    site = LoraSite(0, 0, a_rows.view(-1, k).to(device), b_rows.view(-1, n).to(device))
    slots = rng.integers(0, len(ranks), num_tokens).astype(np.int32)
    slots[::3] = -1
    ids = np.stack([rng.permutation(num_experts)[:top_k] for _ in range(num_tokens)])
    return ExpertCase(
        ExpertPages(site, table, num_experts), firsts.to(device), torch.from_numpy(ids).to(device), slots,
        rng.uniform(0.5, 2, num_tokens).astype(np.float32),
        torch.randn(num_tokens, k, generator=generator).to(dtype).to(device), loras,
    )  # fmt: skip
