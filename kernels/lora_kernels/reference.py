"""The operations in plain torch: the definition of correctness, and the fallback for CPUs without a compiler.

Accumulates in fp32 and rounds once, to the output's dtype. Reads counts and ranks on the host, so on a GPU it waits for
the device: there it is for checking, not for serving.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import kv_codes, sums
from lora_kernels.quantised import QuantisedWeight, round_inputs
from lora_kernels.segments import BLOCK_TOKENS, PAGE_ROWS, AttentionBatch, LoraBatch
from lora_kernels.tables import (
    Activation,
    AdapterTable,
    DecoderLayer,
    GatedDelta,
    GatedExperts,
    GatedScan,
    LoraSite,
    ModelEnds,
    PackedLinear,
    QuantisedLinear,
)


def lora_add_(
    outs: Sequence[Tensor], x: Tensor, sites: Sequence[LoraSite], table: AdapterTable, batch: LoraBatch
) -> None:
    """See `ops.lora_add_`."""
    slots = batch.seg_slots[: batch.num_segments].tolist()
    starts = batch.seg_starts[: batch.num_segments + 1].tolist()
    for segment, slot in enumerate(slots):
        rows = batch.rows[starts[segment] : starts[segment + 1]].long()
        row_scales = 1.0 if batch.row_scales is None else batch.row_scales[starts[segment] : starts[segment + 1], None]
        x_rows = x[rows].float()
        for out, site in zip(outs, sites, strict=True):
            rank = int(table.ranks[slot, site.index])
            if rank == 0:
                continue
            pool_rows = _pool_rows(table, slot, site.group, rank)
            hidden = x_rows @ site.a_rows[pool_rows].float().T
            hidden = hidden if site.factors is None else hidden * site.factors[pool_rows]
            delta = (hidden @ site.b_rows[pool_rows].float()) * (table.scales[slot, site.index] * row_scales)
            out[rows] = (out[rows].float() + delta).to(out.dtype)


def _pool_rows(table: AdapterTable, slot: int, group: int, rank: int) -> Tensor:
    rank_rows = torch.arange(rank, device=table.pages.device)
    pages = table.pages[slot, group].long()
    return pages[rank_rows // PAGE_ROWS] * PAGE_ROWS + rank_rows % PAGE_ROWS


def copy_rows_(pools: Sequence[Tensor], buffer: Tensor, pieces: Tensor) -> None:
    """See `ops.copy_rows_`."""
    for target, source in row_pieces(pools, buffer, pieces):
        target.copy_(source)


def row_pieces(pools: Sequence[Tensor], buffer: Tensor, pieces: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (target, source), of equal shape and dtype, for every copy that `ops.copy_rows_` makes."""
    for pool, row, num, begin in pieces.tolist():
        target = pools[pool][row : row + num]
        yield target, buffer[begin : begin + target.nbytes].view(target.dtype).view(target.shape)


def kv_write_(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, batch: AttentionBatch) -> None:
    """See `ops.kv_write_`."""
    blocks = batch.slot_mapping // BLOCK_TOKENS
    offsets = batch.slot_mapping % BLOCK_TOKENS
    for cache, rows in ((k_cache, k), (v_cache, v)):
        if cache.dtype == torch.int8:
            codes, scales = kv_codes.parts(cache)
            codes[blocks, :, offsets], scales[blocks, :, offsets] = kv_codes.encode(rows)
        else:
            cache[blocks, :, offsets] = rows


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
    out = q.new_empty(q.shape[0], q.shape[1], kv_codes.row_dim(v_cache))
    starts = batch.query_starts.tolist()
    for seq, kv_len in enumerate(batch.kv_lens.tolist()):
        start, end = starts[seq], starts[seq + 1]
        blocks = batch.block_tables[seq, : -(-kv_len // BLOCK_TOKENS)].long()
        # [Hkv, kv_len, D]
        keys = kv_codes.decode(k_cache[blocks]).transpose(0, 1).flatten(1, 2)[:, :kv_len]
        values = kv_codes.decode(v_cache[blocks]).transpose(0, 1).flatten(1, 2)[:, :kv_len]
        weights = _attention_weights(q[start:end], keys, scale=scale, window=window, softcap=softcap, sinks=sinks)
        attended = torch.einsum("hgqk,hkd->qhgd", weights, values.float())
        out[start:end] = attended.flatten(1, 2).to(out.dtype)
    return out


def _attention_weights(
    q: Tensor, keys: Tensor, *, scale: float, window: int, softcap: float, sinks: Tensor | None
) -> Tensor:
    """Return the softmax weights of a sequence's last queries over all its keys: fp32 [Hkv, group, queries, kv_len]."""
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads, kv_len, _ = keys.shape
    grouped = q.view(num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim).float()
    logits = torch.einsum("qhgd,hkd->hgqk", grouped, keys.float()) * scale
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    key_pos = torch.arange(kv_len, device=q.device)
    query_pos = torch.arange(kv_len - num_queries, kv_len, device=q.device)[:, None]
    visible = key_pos <= query_pos
    if window > 0:
        visible &= key_pos > query_pos - window
    logits = logits.masked_fill(~visible, -torch.inf)
    if sinks is None:
        return logits.softmax(-1)
    sink = sinks.float().view(num_kv_heads, -1, 1, 1).expand(-1, -1, num_queries, 1)
    return torch.cat([logits, sink], dim=-1).softmax(-1)[..., :-1]


def pack_linear(*weights: Tensor) -> PackedLinear:
    """See `ops.pack_linear`."""
    first, *others = weights
    weight = torch.cat(weights) if others else first.contiguous()
    return PackedLinear(weight, out_features=weight.shape[0], in_features=weight.shape[1], layout="plain")


def pack_quantised(weights: Sequence[QuantisedWeight]) -> QuantisedLinear:
    """See `ops.pack_quantised`."""
    return QuantisedLinear(list(weights), [], [], [w.out_features for w in weights], weights[0].in_features)


def linear(x: Tensor, packed: PackedLinear | QuantisedLinear, bias: Tensor | None = None) -> Tensor:
    """See `ops.linear`."""
    if isinstance(packed, QuantisedLinear):
        rows = round_inputs(x) if packed.int8_inputs else x.float()
        out = torch.cat([F.linear(rows, weight.dequantise()) for weight in packed.weights], dim=-1)
        return (out if bias is None else out + bias.float()).to(x.dtype)
    if sums.are_fixed():
        return sums.linear_in_blocks(x, packed.weight, bias)
    return F.linear(x, packed.weight, bias)


def grouped_linear(x: Tensor, packed: PackedLinear | QuantisedLinear, ends: Tensor) -> Tensor:
    """See `ops.grouped_linear`."""
    num = packed.out_features // len(ends)
    parts = x.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
    if isinstance(packed, QuantisedLinear):
        [weight] = packed.weights
        weights = [replace(packed, weights=[replace(weight, rows=rows)]) for rows in weight.rows.split(num)]
    else:
        weights = [replace(packed, weight=own) for own in packed.weight.split(num)]
    return torch.cat([linear(part, own) for part, own in zip(parts, weights, strict=True)])


def experts(x: Tensor, ids: Tensor, weights: Tensor, layer: GatedExperts) -> Tensor:
    """See `ops.experts`."""
    chosen, pairs = torch.sort(ids.view(-1), stable=True)
    ends = torch.searchsorted(chosen, torch.arange(layer.num_experts, device=x.device), right=True, out_int32=True)
    gate, up = grouped_linear(x[pairs // ids.shape[1]], layer.gate_up, ends).chunk(2, -1)
    sorted_rows = grouped_linear(gated_act(gate, up, layer.act), layer.down, ends)
    rows = torch.empty_like(sorted_rows).index_copy_(0, pairs, sorted_rows).view(*ids.shape, sorted_rows.shape[1])
    return (weights.float()[..., None] * rows.float()).sum(1).to(x.dtype)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, plus_one: bool = False
) -> Tensor:
    """See `ops.rms_norm`."""
    if residual is not None:
        residual += x
        x = residual
    hidden = x.float()
    hidden = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)
    if plus_one:
        return (hidden * (1.0 + weight.float())).to(x.dtype)
    return weight * hidden.to(x.dtype)


def rotary_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """See `ops.rotary_`."""
    rotary_dim = cos.shape[-1]
    cos, sin = cos.float()[:, None], sin.float()[:, None]
    for heads in (q, k):
        part = heads[..., :rotary_dim]
        first, second = part.float().chunk(2, dim=-1)
        part.copy_(part.float() * cos + torch.cat([-second, first], dim=-1) * sin)


def gated_act(gate: Tensor, up: Tensor, act: Activation) -> Tensor:
    """See `ops.gated_act`."""
    hidden = gate.float()
    if act == "silu":
        hidden = F.silu(hidden)
    else:
        hidden = F.gelu(hidden, approximate="tanh" if act == "gelu_tanh" else "none")
    return (hidden * up.float()).to(gate.dtype)


def mask_logits_(logits: Tensor, rows: Tensor, words: Tensor) -> None:
    """See `ops.mask_logits_`."""
    bits = words[..., None] >> torch.arange(32, dtype=torch.int32, device=words.device) & 1
    forbidden = (bits == 0).flatten(1)[:, : logits.shape[-1]]
    logits[rows] = logits[rows].masked_fill_(forbidden, -torch.inf)


def argmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `ops.argmax`."""
    values, ids = x.max(-1)
    return ids, torch.isfinite(values)


def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, *, skip: Tensor | None = None,
    gate: Tensor | None = None, dt_bias: Tensor | None = None, softplus: bool = False,
) -> Tensor:  # fmt: skip
    """See `ops.selective_scan`."""
    inputs, steps = x.float(), dt.float()
    if dt_bias is not None:
        steps = steps + dt_bias.float()
    if softplus:
        steps = F.softplus(steps)
    outs: list[Tensor] = []
    for token, step, into, from_ in zip(inputs, steps, b.float(), c.float(), strict=True):
        state.mul_(torch.exp(step[:, None] * a.float())).add_((step * token)[:, None] * into)
        outs.append(state @ from_)
    out = torch.stack(outs) if outs else torch.zeros_like(inputs)
    if skip is not None:
        out = out + inputs * skip.float()
    if gate is not None:
        out = out * F.silu(gate.float())
    return out.to(x.dtype)


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
    group = v.shape[1] // k.shape[1]
    query, key = (x.float().repeat_interleave(group, 1) for x in (q, k))
    if normalize:
        query, key = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    query = query * q.shape[-1] ** -0.5
    value, rate = v.float(), beta.float()[..., None]
    decay = torch.exp(g.float()).reshape(*g.shape[:2], -1, 1)
    out = torch.empty_like(value)
    for start, end, read, write, save in runs.tolist():
        state = states[read]
        for t in range(start, end):
            state = state * decay[t]
            known = 0 if additive else (key[t, :, None] @ state)[:, 0]
            change = rate[t] * (value[t] - known)
            state = state + key[t][..., None] * change[:, None]
            out[t] = (query[t, :, None] @ state)[:, 0]
        _leave(states, state, write, save)
    return out.to(v.dtype)


def causal_conv(
    x: Tensor, weight: Tensor, states: Tensor, runs: Tensor, *, bias: Tensor | None = None, silu: bool = False
) -> Tensor:
    """See `ops.causal_conv`."""
    num_taps = weight.shape[1]
    out = x.new_empty(x.shape, dtype=torch.float32)
    for start, end, read, write, save in runs.tolist():
        inputs = torch.cat((states[read], x[start:end]))
        spans = inputs[1:].float().unfold(0, num_taps, 1)  # [tokens, C, K]
        out[start:end] = (spans * weight.float()).sum(-1)
        _leave(states, inputs[-num_taps:], write, save)
    if bias is not None:
        out = out + bias.float()
    return (F.silu(out) if silu else out).to(x.dtype)


def gated_delta(qkv: Tensor, b: Tensor, a: Tensor, layer: GatedDelta, runs: Tensor) -> Tensor:
    """See `ops.gated_delta`."""
    _, heads, key_dim, width = layer.states.shape
    keys = (qkv.shape[1] - heads * width) // 2
    mixed = causal_conv(qkv, layer.conv_weight, layer.conv_states, runs, bias=layer.conv_bias, silu=True)
    q, k, v = mixed.split([keys, keys, heads * width], 1)
    q, k, v = (x.unflatten(1, (-1, dim)) for x, dim in ((q, key_dim), (k, key_dim), (v, width)))
    decay = layer.rates * F.softplus(a.float() + layer.dt_bias)
    return delta_rule(q, k, v, decay, b.sigmoid(), layer.states, runs, normalize=True)


def gated_scan(gate: Tensor, xbc: Tensor, dt: Tensor, layer: GatedScan, runs: Tensor) -> Tensor:
    """See `ops.gated_scan`."""
    _, heads, key_dim, width = layer.states.shape
    keys = (xbc.shape[1] - heads * width) // 2
    mixed = causal_conv(xbc, layer.conv_weight, layer.conv_states, runs, bias=layer.conv_bias, silu=True).float()
    x, key, query = mixed.split([heads * width, keys, keys], 1)
    x, key, query = (part.unflatten(1, (-1, dim)) for part, dim in ((x, width), (key, key_dim), (query, key_dim)))
    step = F.softplus(dt.float() + layer.dt_bias)
    query = query * key_dim**0.5  # cancels the division in `delta_rule`
    out = delta_rule(query, key, x, layer.rates * step, step, layer.states, runs, additive=True)
    out = (out + layer.skip[:, None] * x).flatten(1) * F.silu(gate.float())
    groups = out.unflatten(1, (-1, layer.group))
    normed = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + layer.eps)
    return (layer.norm_weight * normed.flatten(1)).to(xbc.dtype)


def gate_heads_(x: Tensor, gate: Tensor) -> None:
    """See `ops.gate_heads_`."""
    x.copy_(x.float() * gate.float().sigmoid())


def _leave(states: Tensor, state: Tensor, write: int, save: int) -> None:
    states[write] = state
    if save >= 0:
        states[save] = state


def decoder_stack(layers: Sequence[DecoderLayer], ends: ModelEnds | None) -> None:
    """Return None: the reference has nothing faster than one layer after another. See `ops.decoder_stack`."""
