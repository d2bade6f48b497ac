"""The result shapes of the native operators, for torch.compile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels import kv_codes
from lora_kernels.tables import PANEL_COLUMNS


def register_fakes() -> None:
    """Register the shapes; operators that only mutate have no result."""
    fake = torch.library.register_fake

    @fake("lorafleet::linear")
    def _(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
        return x.new_empty(*x.shape[:-1], out_features)

    @fake("lorafleet::pack_quantised")
    def _(rows: Tensor, kind: str, in_features: int) -> tuple[Tensor, int]:
        form, panel_bytes = torch.ops.lorafleet.quantised_form(kind, in_features)
        return rows.new_empty(-(-rows.shape[0] // 32), panel_bytes), form

    @fake("lorafleet::quant_linear")
    def _(
        x: Tensor,
        panels: Sequence[Tensor],
        forms: Sequence[int],
        sizes: Sequence[int],
        bias: Tensor | None,
        int8_inputs: bool,
    ) -> Tensor:
        return x.new_empty(*x.shape[:-1], sum(sizes))

    @fake("lorafleet::paged_attention")
    def _(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: object) -> Tensor:
        return q.new_empty(q.shape[0], q.shape[1], kv_codes.row_dim(v_cache))

    @fake("lorafleet::delta_rule")
    def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
        return v.new_empty(v.shape)

    @fake("lorafleet::gated_delta")
    def _(qkv: Tensor, b: Tensor, *rest: Tensor) -> Tensor:
        return qkv.new_empty(*b.shape, rest[6].shape[3])

    @fake("lorafleet::argmax")
    def _(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_empty(len(x), dtype=torch.int64), x.new_empty(len(x), dtype=torch.bool)

    @fake("lorafleet::grouped_linear")
    def _(x: Tensor, packed: Tensor, ends: Tensor, form: int, int8_inputs: bool) -> Tensor:
        return x.new_empty(len(x), packed.shape[0] // len(ends) * PANEL_COLUMNS)

    for name in ("rms_norm", "gated_act", "experts", "selective_scan", "causal_conv", "gated_scan"):
        fake(f"lorafleet::{name}", lambda x, *_: x.new_empty(x.shape))
    for name in ("pack_linear_", "lora_add_", "kv_write_", "rotary_", "gate_heads_", "mask_logits_"):
        fake(f"lorafleet::{name}", lambda *_: None)
