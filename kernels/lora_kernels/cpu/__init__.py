"""The operations in native C++, for the best instruction set in build.py that the processor supports.

The functions of `reference`, as `torch.library` operators. `load` must be called first: it returns whether they are
available on this machine.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import reference, sums
from lora_kernels.cpu import large_pages
from lora_kernels.cpu.build import BuildError, build_library
from lora_kernels.cpu.fakes import register_fakes
from lora_kernels.quantised import QuantisedWeight
from lora_kernels.segments import AttentionBatch, LoraBatch
from lora_kernels.tables import (
    PANEL_COLUMNS,
    Activation,
    AdapterTable,
    ChangedRows,
    DecoderLayer,
    GatedDelta,
    GatedExperts,
    GatedScan,
    LayerChange,
    LoraSite,
    ModelEnds,
    PackedLinear,
    QuantisedLinear,
    SiblingLinears,
)

_log = logging.getLogger(__name__)
_ops = torch.ops.lorafleet

_CHANGE_KINDS = ("add", "scale", "around", "blocks")
"""In the order in csrc/kernels.h."""


@functools.cache
def load() -> bool:
    """Load the kernels, building them first if necessary.

    Returns False, and logs a warning, if this machine cannot run them.
    """
    try:
        torch.ops.load_library(str(build_library()))
        if not _ops.isas():
            raise BuildError("the processor has no AVX2")
        _use(_ops.isas().split()[0])
    except (BuildError, OSError) as error:
        _log.warning("CPU operations run in plain torch, several times slower than the native kernels: %s", error)
        return False
    register_fakes()
    _ops.fix_sums(sums.are_fixed())
    return True


def fix_sums(is_fixed: bool) -> None:
    """Pass the setting to the kernels if they are loaded; otherwise `load` will."""
    if load.cache_info().currsize and load():
        _ops.fix_sums(is_fixed)


def isa() -> str:
    """Return the instruction set in use, a name in `build.ISA_FLAGS`."""
    return _ops.isa()


def isas() -> list[str]:
    """Return the instruction sets that this processor has kernels for, best first; empty if there are none."""
    return _ops.isas().split() if load() else []


def tried_isas() -> list[str]:
    """Return the sets of `isas` that tests run by default: the best one, which is used, and the lowest."""
    return list(dict.fromkeys([*isas()[:1], *isas()[-1:]]))


def set_isa(name: str) -> None:
    """Use an instruction set instead of the best one, building its kernels first if necessary.

    Raises ValueError if there are no kernels for it on this machine.
    """
    if name not in isas():
        raise ValueError(f"this processor has no {name}, or no native kernels run here")
    try:
        _use(name)
    except BuildError as error:
        raise ValueError(f"its kernels cannot be used: {error}") from error


def _use(name: str) -> None:
    if failure := _ops.use_isa(name, _library_of(name)):
        raise BuildError(failure)


@functools.cache
def _library_of(name: str) -> str:
    return str(build_library(name))


def lora_add_(
    outs: Sequence[Tensor], x: Tensor, sites: Sequence[LoraSite], table: AdapterTable, batch: LoraBatch
) -> None:
    """See `ops.lora_add_`."""
    _ops.lora_add_.default(
        outs,
        x,
        [site.a_rows for site in sites],
        [site.b_rows for site in sites],
        _factors(sites),
        [site.index for site in sites],
        [site.group for site in sites],
        table.ranks,
        table.scales,
        table.pages,
        batch.rows,
        batch.small_tiles,
        batch.large_tiles,
        batch.counts,
        batch.row_scales,
    )


def copy_rows_(pools: Sequence[Tensor], buffer: Tensor, pieces: Tensor) -> None:
    """See `ops.copy_rows_`."""
    _ops.copy_rows_.default(pools, buffer, pieces)


def kv_write_(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch) -> None:
    """See `ops.kv_write_`."""
    _ops.kv_write_.default(k, v, k_cache, v_cache, batch.slot_mapping)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """See `ops.paged_attention`."""
    return _ops.paged_attention.default(
        q,
        k_cache,
        v_cache,
        batch.block_tables,
        batch.query_starts,
        batch.kv_lens,
        scale,
        window,
        softcap,
        None if sinks is None else _floats(sinks),
    )


def pack_linear(*weights: Tensor) -> PackedLinear:
    """See `ops.pack_linear`."""
    in_features, dtype = weights[0].shape[1], weights[0].dtype
    if dtype != torch.bfloat16 or in_features % 2:  # torch handles fp32, fp16 and odd widths
        return reference.pack_linear(*weights)
    out_features = sum(map(len, weights))
    packed = large_pages.weights.empty((-(-out_features // PANEL_COLUMNS), in_features // 2, PANEL_COLUMNS, 2), dtype)
    _ops.pack_linear_.default(packed, [weight.contiguous() for weight in weights])
    return PackedLinear(packed, out_features, in_features, "vnni")


def pack_quantised(weights: Sequence[QuantisedWeight]) -> QuantisedLinear:
    """See `ops.pack_quantised`."""
    packed = [_ops.pack_quantised.default(weight.rows, weight.kind, weight.in_features) for weight in weights]
    sizes = [weight.out_features for weight in weights]
    return QuantisedLinear(
        [], [panels for panels, _ in packed], [form for _, form in packed], sizes, weights[0].in_features
    )


def linear(x: Tensor, packed: PackedLinear | QuantisedLinear, bias: Tensor | None = None) -> Tensor:
    """See `ops.linear`."""
    if isinstance(packed, QuantisedLinear):
        return _ops.quant_linear.default(x, packed.panels, packed.forms, packed.sizes, bias, packed.int8_inputs)
    if packed.layout == "plain":
        return sums.linear_in_blocks(x, packed.weight, bias) if sums.are_fixed() else F.linear(x, packed.weight, bias)
    return _ops.linear.default(x, packed.weight, bias, packed.out_features)


def grouped_linear(x: Tensor, packed: PackedLinear | QuantisedLinear, ends: Tensor) -> Tensor:
    """See `ops.grouped_linear`."""
    if isinstance(packed, PackedLinear) and packed.layout == "plain":
        return reference.grouped_linear(x, packed, ends)
    return _ops.grouped_linear.default(_rows(x), _panels(packed), ends, _form(packed), _rounds(packed))


def experts(x: Tensor, ids: Tensor, weights: Tensor, layer: GatedExperts) -> Tensor:
    """See `ops.experts`."""
    both = layer.gate_up, layer.down
    if any(isinstance(packed, PackedLinear) and packed.layout == "plain" for packed in both):
        return reference.experts(x, ids, weights, layer)
    return _ops.experts.default(
        _rows(x),
        ids.long().contiguous(),
        _floats(weights),
        *map(_panels, both),
        [*map(_form, both)],
        any(map(_rounds, both)),
        layer.act,
        layer.num_experts,
    )


def _panels(packed: PackedLinear | QuantisedLinear) -> Tensor:
    """Return the panels of a single weight, or of several packed as one."""
    if isinstance(packed, PackedLinear):
        return packed.weight
    [panels] = packed.panels
    return panels


def _form(packed: PackedLinear | QuantisedLinear) -> int:
    return packed.forms[0] if isinstance(packed, QuantisedLinear) else -1


def _rounds(packed: PackedLinear | QuantisedLinear) -> bool:
    return isinstance(packed, QuantisedLinear) and packed.int8_inputs


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, plus_one: bool = False
) -> Tensor:
    """See `ops.rms_norm`."""
    return _ops.rms_norm.default(_rows(x), weight, eps, residual, plus_one)


def rotary_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """See `ops.rotary_`."""
    _ops.rotary_.default(q, k, cos, sin)


def gated_act(gate: Tensor, up: Tensor, act: Activation) -> Tensor:
    """See `ops.gated_act`."""
    return _ops.gated_act.default(gate, up, act)


def mask_logits_(logits: Tensor, rows: Tensor, words: Tensor) -> None:
    """See `ops.mask_logits_`."""
    _ops.mask_logits_.default(logits, rows, words)


def argmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `ops.argmax`."""
    return _ops.argmax.default(x)


def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, *, skip: Tensor | None = None,
    gate: Tensor | None = None, dt_bias: Tensor | None = None, softplus: bool = False,
) -> Tensor:  # fmt: skip
    """See `ops.selective_scan`."""
    ours = state.T.contiguous()  # channels last: they are the vector lanes
    out = _ops.selective_scan.default(
        _rows(x), _floats(dt), _floats(a.T), _floats(b), _floats(c), ours, None if skip is None else _floats(skip),
        None if gate is None else _rows(gate.to(x.dtype)), None if dt_bias is None else _floats(dt_bias), softplus,
    )  # fmt: skip
    state.copy_(ours.T)
    return out


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    states: Tensor,
    runs: Tensor,
    *,
    normalize: bool = False,
    additive: bool = False,
) -> Tensor:
    """See `ops.delta_rule`."""
    k, v, dtype = k.to(q.dtype), v.to(q.dtype), v.dtype
    return _ops.delta_rule.default(
        _rows(q), _rows(k), _rows(v), _floats(g), _floats(beta), states, runs, normalize, additive
    ).to(dtype)


def causal_conv(
    x: Tensor, weight: Tensor, states: Tensor, runs: Tensor, *, bias: Tensor | None = None, silu: bool = False
) -> Tensor:
    """See `ops.causal_conv`."""
    return _ops.causal_conv.default(_rows(x), weight.contiguous(), states, runs, bias, silu)


def gated_delta(qkv: Tensor, b: Tensor, a: Tensor, layer: GatedDelta, runs: Tensor) -> Tensor:
    """See `ops.gated_delta`."""
    return _ops.gated_delta.default(
        qkv, b, a, layer.conv_weight, layer.conv_bias, layer.conv_states, layer.rates, layer.dt_bias, layer.states, runs
    )


def gated_scan(gate: Tensor, xbc: Tensor, dt: Tensor, layer: GatedScan, runs: Tensor) -> Tensor:
    """See `ops.gated_scan`."""
    mixing = (layer.conv_weight, layer.conv_bias, layer.conv_states, layer.rates, layer.dt_bias, layer.skip)
    norm = (layer.norm_weight, layer.eps, layer.group)
    return _ops.gated_scan.default(gate, xbc, dt, *mixing, layer.states, *norm, runs)


def gate_heads_(x: Tensor, gate: Tensor) -> None:
    """See `ops.gate_heads_`."""
    _ops.gate_heads_.default(x, gate)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _floats(x: Tensor) -> Tensor:
    return x.float().contiguous()


class NativeDecoderStack:
    """A `ops.DecoderStack` in native code: csrc/stack.cpp."""

    def __init__(self, layers: Sequence[DecoderLayer], ends: ModelEnds | None) -> None:
        self._number: int = _ops.stack_new()
        weakref.finalize(self, _ops.stack_free, self._number)
        for layer in layers:
            attention = layer.attention
            for norm in (layer.attention_norm, layer.mlp_norm, *layer.head_norms):
                _ops.stack_norm(self._number, norm.weight, norm.eps, norm.plus_one)
            for linears in (layer.qkv, layer.out, layer.gate_up, layer.down):
                _ops.stack_linears(self._number, *_linears(linears))
            if isinstance(attention, GatedDelta):
                _ops.stack_delta(
                    self._number,
                    attention.conv_weight,
                    attention.conv_bias,
                    attention.conv_states,
                    attention.rates,
                    attention.dt_bias,
                    attention.states,
                    layer.act,
                )
                continue
            _ops.stack_layer(
                self._number,
                [
                    attention.num_heads,
                    attention.num_kv_heads,
                    attention.head_dim,
                    attention.value_dim,
                    attention.window,
                    attention.is_gated,
                ],
                attention.scale,
                attention.softcap,
                attention.k_cache,
                attention.v_cache,
                None if attention.sinks is None else _floats(attention.sinks),
                layer.act,
            )
        if ends is not None:
            _ops.stack_norm(self._number, ends.norm.weight, ends.norm.eps, ends.norm.plus_one)
            _ops.stack_linears(self._number, *_linears(ends.head))
            _ops.stack_ends(self._number, None if ends.embedding is None else ends.embedding.weight)

    def run(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attention: AttentionBatch,
        table: AdapterTable | None,
        lora: LoraBatch | None,
        changes: ChangedRows | None = None,
        runs: Tensor | None = None,
    ) -> None:
        """See `ops.DecoderStack.run`."""
        lists = _step(attention, table, lora, runs)
        _ops.stack_run.default(self._number, x, cos, sin, *lists, *_lora(lora), _changes(changes))

    def logits(
        self, tokens: Tensor, positions: Tensor, angles: Tensor, logit_rows: Tensor | None, attention: AttentionBatch,
        table: AdapterTable | None, lora: LoraBatch | None, head_lora: LoraBatch | None,
        changes: ChangedRows | None = None, head_changes: ChangedRows | None = None, runs: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `ops.DecoderStack.logits`."""
        lists = *_step(attention, table, lora or head_lora, runs), *_lora(lora), _changes(changes)
        return _ops.stack_logits.default(
            self._number, tokens, positions, angles, logit_rows, *lists, *_lora(head_lora), _changes(head_changes)
        )

    def prepare(self, changes: Sequence[LayerChange]) -> NativeChanges | None:
        """See `ops.DecoderStack.prepare`."""
        return None if sums.are_fixed() else NativeChanges(changes)


class NativeChanges:
    """A `tables.AdapterChanges` in native code: csrc/changes.cpp."""

    def __init__(self, changes: Sequence[LayerChange]) -> None:
        self.number: int = _ops.changes_new()
        weakref.finalize(self, _ops.changes_free, self.number)
        for change in changes:
            kind = _CHANGE_KINDS.index(change.kind)
            second = None if change.second is None else _floats(change.second)
            first = _floats(change.first)
            _ops.changes_add.default(self.number, change.site, change.of_inputs, kind, first, second, change.group)


def _changes(changes: ChangedRows | None) -> list[Tensor]:
    return [] if changes is None else changes.lists


def _step(
    attention: AttentionBatch, table: AdapterTable | None, lora: LoraBatch | None, runs: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    adapters = [] if lora is None or table is None else [table.ranks, table.scales, table.pages]
    states = [] if runs is None else [runs]
    lists = [attention.block_tables, attention.query_starts, attention.kv_lens, attention.slot_mapping, *states]
    return lists, adapters


def _lora(lora: LoraBatch | None) -> tuple[list[Tensor], Tensor | None]:
    return (
        ([], None) if lora is None else ([lora.rows, lora.small_tiles, lora.large_tiles, lora.counts], lora.row_scales)
    )


def decoder_stack(layers: Sequence[DecoderLayer], ends: ModelEnds | None) -> NativeDecoderStack | None:
    """See `ops.decoder_stack`. Return None if sums are fixed but torch would compute plain weights in another order."""
    linears = [part for layer in layers for part in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    if sums.are_fixed() and any(_is_plain(part) for part in (*linears, *([] if ends is None else [ends.head]))):
        return None
    return NativeDecoderStack(layers, ends)


def _is_plain(linears: SiblingLinears) -> bool:
    return isinstance(linears.packed, PackedLinear) and linears.packed.layout == "plain"


def _linears(linears: SiblingLinears) -> tuple[object, ...]:
    sites, packed = linears.sites, linears.packed
    quantised = isinstance(packed, QuantisedLinear)
    return (
        packed.panels if quantised else [packed.weight],
        packed.forms if quantised else [],
        quantised and packed.int8_inputs,
        linears.bias,
        linears.sizes,
        [site.a_rows for site in sites],
        [site.b_rows for site in sites],
        _factors(sites),
        [site.index for site in sites],
        [site.group for site in sites],
    )


def _factors(sites: Sequence[LoraSite]) -> list[Tensor]:
    return [site.factors for site in sites if site.factors is not None]
