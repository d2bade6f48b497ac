"""The types of data that stays in memory between steps: the adapter pool, packed weights, and layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from lora_kernels.quantised import QuantisedWeight

Activation = Literal["silu", "gelu", "gelu_tanh"]

PANEL_COLUMNS = 32
"""Output columns in a panel of a packed weight, see csrc/kernels.h."""


@dataclass(frozen=True, slots=True)
class LoraSite:
    """One linear layer's rows of the adapter pool. K and N are the layer's input and output widths."""

    index: int  # column of AdapterTable.ranks and .scales
    group: int  # page space: the row of AdapterTable.pages that addresses a_rows and b_rows
    a_rows: Tensor  # [pages * PAGE_ROWS, K] rank rows of A
    b_rows: Tensor  # [pages * PAGE_ROWS, N] rank rows of B transposed
    factors: Tensor | None = (
        None  # float32 [pages * PAGE_ROWS], for int8 rows: factor on the product of a row's A and B
    )


@dataclass(slots=True)
class AdapterTable:
    """The adapters in the pool, by slot. Changed only when an adapter is loaded or evicted, never by a step.

    Rank row j of a slot is row pages[slot, group, j // PAGE_ROWS] * PAGE_ROWS + j % PAGE_ROWS of the site's pool.
    """

    ranks: Tensor  # int32 [slots, sites]; 0: the adapter does not change the site
    scales: Tensor  # float32 [slots, sites]
    pages: Tensor  # int32 [slots, groups, max_pages]
    host: AdapterTable | None = None  # a copy in host memory, to plan launches without waiting for the device


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A linear layer's weight, packed for one implementation."""

    weight: Tensor
    out_features: int
    in_features: int
    layout: Literal["plain", "vnni"]  # plain: [N, K] as in torch; vnni: pairs of K interleaved over columns


@dataclass(frozen=True, slots=True)
class QuantisedLinear:
    """Quantized weights of linear layers with a common input, packed for one implementation."""

    weights: list[QuantisedWeight]  # only for the reference; elsewhere `panels` replaces them
    panels: list[Tensor]  # uint8 [panels, bytes] per weight, see csrc/quant_forms.h
    forms: list[int]  # layout of each weight's panels
    sizes: list[int]  # output width of each weight
    in_features: int
    int8_inputs: bool = False  # whether inputs are rounded to int8 codes, see `quantised.round_inputs`

    @property
    def out_features(self) -> int:
        """The output width of all weights."""
        return sum(self.sizes)


@dataclass(frozen=True, slots=True)
class GatedExperts:
    """The weights of a mixture's experts, see `ops.experts`: D inputs and outputs, I columns between the products."""

    num_experts: int
    gate_up: PackedLinear | QuantisedLinear  # [num_experts * 2 * I, D], each expert's gate, then its up
    down: PackedLinear | QuantisedLinear  # [num_experts * D, I]
    act: Activation


@dataclass(frozen=True, slots=True)
class LayerChange:
    """One change, other than rank rows, that an adapter makes to a linear layer's inputs or outputs x [n, D].

    "add": x + first. "scale": x * first; if `second` is set, each number's partner times `second` is added: partners
    are in the other half of each `group`, negated for the first half. "around": (x - second) * first + second, with
    zero for no second. "blocks": x in pieces of `size`, each times its matrix. Computed in fp32 and rounded to x's
    dtype after each change.
    """

    site: int  # `LoraSite.index`
    of_inputs: bool
    kind: Literal["add", "scale", "around", "blocks"]
    first: Tensor  # fp32 [D]; for "blocks" [D / size, size, size]
    second: Tensor | None = None  # fp32 [D]
    group: int = 0


class AdapterChanges(Protocol):
    """One adapter's changes, prepared for a `DecoderStack`."""

    number: int


@dataclass(frozen=True, slots=True)
class ChangedRows:
    """Rows of a step whose adapters change layers, in the form of `DecoderStack`."""

    owners: list[AdapterChanges]  # kept alive while the lists refer to them
    lists: list[Tensor]  # int64: the changes' numbers, the row count of each, and the rows, ascending; empty: no rows


def changed_rows(own: Sequence[tuple[AdapterChanges, Tensor]]) -> ChangedRows:
    """Return the rows of adapters that change layers. own: for each, rows int64 [n], ascending, on the CPU."""
    if not own:
        return ChangedRows([], [])
    owners = [changes for changes, _ in own]
    numbers = torch.tensor([changes.number for changes in owners])
    return ChangedRows(owners, [numbers, torch.tensor([len(rows) for _, rows in own]), torch.cat([r for _, r in own])])


@dataclass(frozen=True, slots=True)
class SiblingLinears:
    """Linear layers with a common input, packed for one product, and their rows of the adapter pool."""

    packed: PackedLinear | QuantisedLinear
    bias: Tensor | None
    sizes: list[int]  # output width of each layer
    sites: list[LoraSite]  # one per layer; empty: no adapter can change them


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """The arguments of `ops.rms_norm` that are constant over steps."""

    weight: Tensor
    eps: float
    plus_one: bool


@dataclass(frozen=True, slots=True)
class PagedAttention:
    """An attention layer: its shapes and its KV cache. See `ops.paged_attention`."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    window: int
    scale: float
    softcap: float
    sinks: Tensor | None
    k_cache: Tensor  # [blocks, Hkv, 16, D]
    v_cache: Tensor  # [blocks, Hkv, 16, Dv]
    is_gated: bool = False  # whether a head's queries are followed by its gates; see `ops.gate_heads_`


@dataclass(frozen=True, slots=True)
class GatedDelta:
    """A gated delta rule with its convolution. G: number of value heads. See `ops.gated_delta`."""

    conv_weight: Tensor  # [C, K]
    conv_bias: Tensor | None  # [C]
    conv_states: Tensor  # [slots, K, C]
    rates: Tensor  # fp32 [G]
    dt_bias: Tensor  # fp32 [G]
    states: Tensor  # fp32 [slots, G, K, V]


@dataclass(frozen=True, slots=True)
class GatedScan:
    """Mamba2's mixer between its projections. H: number of heads; I: their total width. See `ops.gated_scan`."""

    conv_weight: Tensor  # [C, K]
    conv_bias: Tensor | None  # [C]
    conv_states: Tensor  # [slots, K, C]
    rates: Tensor  # fp32 [H]
    dt_bias: Tensor  # fp32 [H]
    skip: Tensor  # fp32 [H]
    states: Tensor  # fp32 [slots, H, N, P]
    norm_weight: Tensor  # [I]
    eps: float
    group: int  # columns normalized together; spans whole heads


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """x += out(attention(rotary(qkv(norm(x))))); x += down(act(gate(norm(x))) * up(norm(x))).

    With a gated delta rule in place of attention: out(norm(delta(qkv, b, a)) * silu(z)), for siblings qkv, z, b, a.
    """

    attention_norm: RmsNorm
    mlp_norm: RmsNorm
    head_norms: tuple[RmsNorm, ...]  # of each head's queries, and keys; or of a delta rule's output
    qkv: SiblingLinears
    attention: PagedAttention | GatedDelta
    out: SiblingLinears
    gate_up: SiblingLinears
    act: Activation
    down: SiblingLinears


@dataclass(frozen=True, slots=True)
class ModelEnds:
    """The parts around decoder layers that make a model: head(norm(layers(embedding[ids])))."""

    embedding: PackedLinear | None  # rows by token id; None: layers are given rows instead of ids
    norm: RmsNorm
    head: SiblingLinears
