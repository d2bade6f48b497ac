"""The blocks that most decoders share, each as a few native operations instead of many small ones.

Each replaces modules that `shortcuts` recognizes. Rows are a step's packed tokens: [T, width].
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
)

from gpu_worker.layers.apply_extras import AdaptableModule, ExtraRows
from gpu_worker.layers.attention import PagedLayer, StepContext
from gpu_worker.layers.lora import SharedInput
from gpu_worker.layers.mixers import MixerStates
from gpu_worker.layers.stack_changes import StackChanges
from gpu_worker.layers.tied import TiedEmbedding
from lora_kernels import ops

FEWEST_ANGLES = 4096
"""Positions in the first table of rotary embeddings on a CPU; a longer text at least doubles the table."""

PLAIN_OUTPUTS: tuple[tuple[type[Any], type[Any]], ...] = (
    (BaseModelOutputWithPast, CausalLMOutputWithPast),
    (MoeModelOutputWithPast, MoeCausalLMOutputWithPast),
)
"""Classes of the results of a decoder, and of the model around it: without experts, and with them."""


class Norm:
    """RMSNorm: see `ops.rms_norm`. A gated mixer's is multiplied by silu(gate)."""

    def __init__(self, weight: Tensor, eps: float, *, plus_one: bool, impl: ops.Impl | None) -> None:
        self.weight = weight
        self.eps = eps
        self.plus_one = plus_one
        self.impl: ops.Impl | None = impl
        self.adaptable: AdaptableModule | None = None  # None: no adapter may replace the weight
        self.context = StepContext()

    def forward(self, x: Tensor, *gates: Tensor) -> Tensor:
        """Return the norm of x [..., D]. gates: none, or one of the shape of x."""
        # Heads that are transposed or views of a fused projection are copied: the operation needs rows at one stride.
        rows = x.reshape(-1, x.shape[-1])
        weight = self.weight.to(x.dtype)  # a scan's output is fp32, whatever the model's dtype
        out = ops.rms_norm(rows, weight, self.eps, plus_one=self.plus_one, impl=self.impl)
        for gate in gates:
            out = ops.gated_act(gate.reshape(rows.shape).to(x.dtype), out, "silu", impl=self.impl)
        return self._finish(out.view(x.shape), x, *gates)

    @property
    def constants(self) -> ops.RmsNorm:
        """The norm as input of a whole-layer operation."""
        return ops.RmsNorm(self.weight, self.eps, self.plus_one)

    def add_forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual += x, in place; return the norm of the sum. x, residual: [T, D]."""
        out = ops.rms_norm(x, self.weight, self.eps, residual=residual, plus_one=self.plus_one, impl=self.impl)
        return self._finish(out, residual)

    def _finish(self, out: Tensor, x: Tensor, *gates: Tensor) -> Tensor:
        if self.context.extras and self.adaptable is not None:
            self.adaptable.apply_norms(self.context.extras, out, x, *gates)
        return out


class GatedMlp:
    """down(act(gate(x)) * up(x))."""

    def __init__(self, gate_up: SharedInput, down: SharedInput, act: ops.Activation, impl: ops.Impl | None) -> None:
        """gate_up: two siblings, or one linear layer whose output is the gate followed by up."""
        self.gate_up = gate_up
        self.down = down
        self.act: ops.Activation = act
        self.impl: ops.Impl | None = impl

    def run(self, rows: Tensor) -> Tensor:
        """Return the output [T, width] for rows [T, width]."""
        outs = self.gate_up.project(rows)
        gate, up = outs if len(outs) == 2 else outs[0].chunk(2, dim=-1)
        return self.down.project(ops.gated_act(gate, up, self.act, impl=self.impl))[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for x [1, T, width], as the model calls it."""
        return self.run(x.view(-1, x.shape[-1])).view(x.shape)


class CalledMlp:
    """A feed-forward part in Hugging Face's version, such as a mixture of experts with its router."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def run(self, rows: Tensor) -> Tensor:
        """Return the output [T, width] for rows [T, width]."""
        return self.module(rows[None])[0]


class RotaryAttention:
    """out(attention(rotary(qkv(x)))), in some models with RMSNorm of each head's queries and keys before `rotary`."""

    def __init__(
        self, layer: PagedLayer, qkv: SharedInput, out: SharedInput, norms: tuple[Norm, ...], *, is_gated: bool = False
    ) -> None:
        """qkv: three siblings, or one linear layer whose output is q, k, v. norms: of the heads' q and k, or none.

        is_gated: whether each head's q is followed by numbers whose sigmoid multiplies the head's output.
        """
        self.layer = layer
        self.qkv = qkv
        self.out = out
        self.norms = norms
        self.is_gated = is_gated

    def run(self, rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the output [T, width] for rows [T, width]. cos, sin: [T, R], as in `ops.rotary_`."""
        call = self.layer.call
        outs = self.qkv.project(rows)
        q, k, v = outs if len(outs) == 3 else outs[0].split(call.widths, dim=-1)
        q = q.view(-1, call.num_heads, q.shape[1] // call.num_heads)
        q, gate = q[..., : call.head_dim], q[..., call.head_dim :]
        k = k.view(-1, call.num_kv_heads, call.head_dim)
        v = v.view(-1, call.num_kv_heads, call.value_dim)
        if self.norms:
            q, k = self.norms[0].forward(q), self.norms[1].forward(k)
        ops.rotary_(q, k, cos, sin, impl=self.layer.impl)
        attended = self.layer.attend(q, k, v, call.scale, call.softcap, call.sinks)
        if self.is_gated:
            ops.gate_heads_(attended, gate, impl=self.layer.impl)
        return self.out.project(attended.view(len(rows), -1))[0]

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], *_: Any, **__: Any
    ) -> tuple[Tensor, None]:
        """Return the output for hidden_states [1, T, width], as the model calls it."""
        cos, sin = position_embeddings
        out = self.run(hidden_states.view(-1, hidden_states.shape[-1]), cos[0], sin[0])
        return out.view(*hidden_states.shape[:-1], out.shape[-1]), None

    @property
    def memory(self) -> object:
        """The tensor whose content later tokens read."""
        return self.layer.k_cache

    @property
    def constants(self) -> ops.PagedAttention:
        """The attention as input of a whole-layer operation. The KV cache must be allocated."""
        return replace(self.layer.attention, is_gated=self.is_gated)


class DeltaMixer:
    """out(norm(delta(qkv(x), b(x), a(x))) * silu(z(x))): a gated delta rule layer. See `ops.gated_delta`."""

    def __init__(
        self,
        mixers: MixerStates,
        index: int,
        projections: SharedInput,
        out: SharedInput,
        norm: Norm,
        conv: nn.Conv1d,
        rates: Tensor,
        dt_bias: Tensor,
    ) -> None:
        """index: of its convolution's call among the mixers'; the delta rule's call is the next.

        projections: qkv, z, b and a. norm: of each head's output, gated. rates, dt_bias: fp32 [G].
        """
        self.mixers = mixers
        self.index = index
        self.qkv = projections
        self.out = out
        self.norms = (norm,)
        self._weight = conv.weight.detach().squeeze(1)
        self._bias = None if conv.bias is None else conv.bias.detach()
        self._rates = rates
        self._dt_bias = dt_bias

    def runs(self) -> Tensor:
        """Return the step's runs for this layer's calls, marking these as reached."""
        return self.mixers.runs_of(self.index, 2)

    def run(self, rows: Tensor, *_: Tensor) -> Tensor:
        """Return the output [T, width] for rows [T, width]."""
        qkv, z, b, a = self.qkv.project(rows)
        mixed = ops.gated_delta(qkv, b, a, self.constants, self.runs())
        heads = mixed.view(-1, mixed.shape[2])
        normed = self.norms[0].forward(heads, z.reshape(heads.shape))
        return self.out.project(normed.view(len(rows), -1))[0]

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return the output for hidden_states [1, T, width], as the model calls it."""
        return self.run(hidden_states.view(-1, hidden_states.shape[-1])).view(hidden_states.shape)

    @property
    def memory(self) -> object:
        """The tensor whose content later tokens read."""
        return self.mixers.calls[self.index].states

    @property
    def constants(self) -> ops.GatedDelta:
        """The delta rule as input of operations. The states must be allocated."""
        taps, states = (call.states for call in self.mixers.calls[self.index : self.index + 2])
        assert taps is not None
        assert states is not None
        return ops.GatedDelta(self._weight, self._bias, taps, self._rates, self._dt_bias, states)


class PreNormLayer:
    """x += attention(norm(x)); x += mlp(norm(x)). Changes its input in place."""

    def __init__(
        self, attention: RotaryAttention | DeltaMixer, mlp: GatedMlp | CalledMlp, first: Norm, second: Norm
    ) -> None:
        self.attention = attention
        self.mlp = mlp
        self.first = first
        self.second = second

    def run(self, rows: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Change rows [T, width] in place. cos, sin: [T, R]."""
        attended = self.attention.run(self.first.forward(rows), cos, sin)
        rows += self.mlp.run(self.second.add_forward(attended, rows))

    def forward(self, hidden_states: Tensor, *_: Any, position_embeddings: tuple[Tensor, Tensor], **__: Any) -> Tensor:
        """Return hidden_states [1, T, width], changed in place, as the model calls it."""
        cos, sin = position_embeddings
        self.run(hidden_states.view(-1, hidden_states.shape[-1]), cos[0], sin[0])
        return hidden_states

    @property
    def linears(self) -> list[SharedInput]:
        """The layer's linear layers, in execution order; of a called feed-forward part, none."""
        attention, mlp = self.attention, self.mlp
        return [attention.qkv, attention.out, *([mlp.gate_up, mlp.down] if isinstance(mlp, GatedMlp) else [])]

    @property
    def is_opaque(self) -> bool:
        """Whether some part can only be called, which rules out a single operation for the whole layer."""
        return isinstance(self.mlp, CalledMlp) or any(inputs.is_opaque for inputs in self.linears)

    @property
    def constants(self) -> ops.DecoderLayer:
        """The layer as input of `ops.decoder_stack`. The KV cache must be allocated, and no part opaque."""
        attention, mlp = self.attention, self.mlp
        assert isinstance(mlp, GatedMlp)
        return ops.DecoderLayer(
            attention_norm=self.first.constants,
            mlp_norm=self.second.constants,
            head_norms=tuple(norm.constants for norm in attention.norms),
            qkv=attention.qkv.linears,
            attention=attention.constants,
            out=attention.out.linears,
            gate_up=mlp.gate_up.linears,
            act=mlp.act,
            down=mlp.down.linears,
        )


class LayerStack:
    """Consecutive pre-norm layers as one call; replaces the first of them in the model."""

    def __init__(self, layers: list[PreNormLayer], impl: ops.Impl | None) -> None:
        self.layers = layers
        self.impl: ops.Impl | None = impl
        self._is_opaque = any(layer.is_opaque for layer in layers)
        self.one_call = True  # False: one call per layer, so that a profile shows each
        self.ends: Callable[[], ops.ModelEnds] | None = None  # builds a whole-model call from the layers, if possible
        self.head: SharedInput | None = None  # the head of the whole-model call
        self.is_tapped = False  # whether to store the inputs of the tapped layers in `taken`
        self.taken: list[Tensor] = []  # [T, width] each
        self._parts: list[LayerStack] = []
        self._stack: ops.DecoderStack | None = None
        self._changes: StackChanges | None = None
        self._built_for: tuple[object, ...] = ()  # caches, adapter table and ends with which `_stack` was built
        self._mixer = next((layer.attention for layer in reversed(layers) if type(layer.attention) is DeltaMixer), None)

    @property
    def context(self) -> StepContext:
        """The context with the step's work lists."""
        return self.layers[0].attention.qkv.context

    @property
    def table(self) -> ops.AdapterTable | None:
        """The adapter pool's table, None without a pool."""
        return self.layers[0].attention.qkv.table

    def runs(self) -> Tensor | None:
        """Return the step's runs, marking the layers' calls as reached; None if no layer has states."""
        return None if self._mixer is None else self._mixer.runs()

    def native(self) -> ops.DecoderStack | None:
        """Return the native call for all layers, built if necessary; None if each layer has its own call."""
        if self._is_opaque:
            return None
        holds = (*(layer.attention.memory for layer in self.layers), self.table, self.ends)
        if len(self._built_for) != len(holds) or any(map(operator.is_not, holds, self._built_for)):
            ends = None if self.ends is None else self.ends()
            self._stack = ops.decoder_stack([layer.constants for layer in self.layers], ends, impl=self.impl)
            parts = [part for layer in self.layers for part in layer.linears]
            self._changes = None if self._stack is None else StackChanges(self._stack, parts, self.head)
            self._built_for = holds
        return self._stack if self.one_call else None

    def changes(self, groups: list[ExtraRows], *, everywhere: bool = False) -> ops.ChangedRows | None:
        """Return the changes by adapters in a step, for the native call; None if it cannot apply all of them.

        everywhere: include the embedding and the head.
        """
        if not groups:
            return ops.changed_rows([])
        return None if self._changes is None else self._changes.rows(groups, everywhere=everywhere)

    def tap(self, layers: Sequence[int]) -> None:
        """Choose the layers whose inputs are stored in tapped steps, in ascending order, without the first layer."""
        ends = [0, *layers, len(self.layers)]
        self._parts = [LayerStack(self.layers[start:end], self.impl) for start, end in pairwise(ends)]

    def run(self, rows: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Apply all layers to rows [T, width], in place. cos, sin: [T, R]."""
        if self.is_tapped:
            self.taken.clear()
            for i, part in enumerate(self._parts):
                if i:
                    self.taken.append(rows.clone())
                part.run(rows, cos, sin)
            return
        native, context = self.native(), self.context
        changes = None if native is None else self.changes(context.extras)
        if native is None or changes is None:
            for layer in self.layers:
                layer.run(rows, cos, sin)
            return
        assert context.attention is not None
        native.run(rows, cos, sin, context.attention, self.table, context.lora, changes, self.runs())

    def forward(self, hidden_states: Tensor, *_: Any, position_embeddings: tuple[Tensor, Tensor], **__: Any) -> Tensor:
        """Return hidden_states [1, T, width], changed in place, as the model calls it."""
        cos, sin = position_embeddings
        self.run(hidden_states.view(-1, hidden_states.shape[-1]), cos[0], sin[0])
        return hidden_states


class Angles:
    """The rotary embeddings of positions.

    On a CPU they are computed once, and steps look them up: the module's dozen small operations take as long as a
    layer.
    """

    def __init__(self, module: nn.Module, max_positions: int) -> None:
        """Start with an empty table.

        module: returns cosines and sines of positions. max_positions: 0 if no limit is known. Some modules change the
        values of all positions once one exceeds the limit, so positions beyond it are never requested ahead of need.
        """
        self._module = module
        self._max_positions = max_positions
        self._table = torch.empty(0)  # [positions, 2 * R], cosines and sines

    def of(self, positions: Tensor, end: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin [T, R] of positions, int64 [T], all below `end`, with the dtype and device of `like`."""
        if like.device.type != "cpu":
            cos, sin = self._module(like, position_ids=positions[None])
            return cos[0], sin[0]
        cos, sin = self.upto(end, like).index_select(0, positions).chunk(2, -1)
        return cos, sin

    def upto(self, end: int, like: Tensor) -> Tensor:
        """Return cos and sin of at least the positions below `end`: [positions, 2 * R], on a CPU."""
        if end > len(self._table):
            num = max(FEWEST_ANGLES, 1 << (end - 1).bit_length())
            num = max(end, min(num, self._max_positions or num))
            self._table = torch.cat(self._module(like, position_ids=torch.arange(num)[None]), -1)[0]
        return self._table


class PlainDecoder:
    """norm(stack(embedding(ids))), without Hugging Face's code around it.

    Its masks, caches, output recording and a call per layer take half a millisecond per step, whatever the step's size.
    """

    def __init__(
        self,
        module: nn.Module,
        embedding: nn.Module,
        angles: Angles,
        stack: LayerStack,
        norm: nn.Module,
        outputs: tuple[type[Any], type[Any]],
    ) -> None:
        """embedding, norm: parts of `module`, the decoder, whose own forward handles other kinds of calls.

        outputs: see `PLAIN_OUTPUTS`.
        """
        self.module = module
        self.outputs = outputs
        self.embedding = embedding
        self.angles = angles
        self.stack = stack
        self.norm = norm
        self._forward = module.forward

    def run(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return the hidden states [T, width] of ids and positions, int64 [T]."""
        attention = self.stack.context.attention
        assert attention is not None
        rows = self.embedding.forward(ids[None])[0]
        self.stack.run(rows, *self.angles.of(positions, attention.max_kv_len, rows))
        return self.norm.forward(rows)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the hidden states of input_ids and position_ids [1, T]; leave other arguments to the decoder."""
        ids, positions = kwargs.get("input_ids"), kwargs.get("position_ids")
        num_asked = sum(value is not None and value is not False for value in kwargs.values())
        if args or ids is None or positions is None or num_asked > 2:
            return self._forward(*args, **kwargs)
        return self.outputs[0](last_hidden_state=self.run(ids[0], positions[0])[None])


class PlainModel:
    """head(decoder(ids)), without Hugging Face's code around it; on a CPU in one call."""

    def __init__(self, decoder: PlainDecoder, norm: Norm, head: SharedInput) -> None:
        """norm: the decoder's own, after its layers. head: a single linear layer."""
        self.decoder = decoder
        self.norm = norm
        self.head = head
        lookup = decoder.embedding
        self._rows = lookup.packed if type(lookup) is TiedEmbedding and lookup.embed_scale is None else None
        if not head.is_opaque:
            decoder.stack.ends, decoder.stack.head = self._ends, head

    def _ends(self) -> ops.ModelEnds:
        return ops.ModelEnds(self._rows, self.norm.constants, self.head.linears)

    def run(self, ids: Tensor, positions: Tensor, logit_rows: Tensor | None) -> Tensor:
        """Return the same as `BaseModel.forward`."""
        decoder = self.decoder
        stack, context = decoder.stack, decoder.stack.context
        native = stack.native() if stack.ends is not None and not stack.is_tapped else None
        changes = None if native is None else stack.changes(context.extras, everywhere=True)
        head_changes = None if changes is None else stack.changes(context.extras_logits, everywhere=True)
        if native is None or head_changes is None:
            hidden = decoder.run(ids, positions)
            return self.head.project(hidden if logit_rows is None else hidden.index_select(0, logit_rows))[0]
        assert context.attention is not None
        tokens = ids if self._rows is not None else decoder.embedding.forward(ids)
        angles = decoder.angles.upto(context.attention.max_kv_len, self.norm.weight)
        return native.logits(
            tokens, positions, angles, logit_rows, context.attention, stack.table, context.lora, context.lora_logits,
            changes, head_changes, stack.runs(),
        )  # fmt: skip

    def forward(self, input_ids: Tensor, position_ids: Tensor, logits_to_keep: Tensor, **_: Any) -> Any:
        """Return the logits of a step through the model's own signature, for comparison with the original."""
        return self.decoder.outputs[1](logits=self.run(input_ids[0], position_ids[0], logits_to_keep)[None])


def stacks_of(model: nn.Module) -> list[LayerStack]:
    """Return the layer stacks installed in a model."""
    owners = [getattr(module.forward, "__self__", None) for module in model.modules()]
    return [owner for owner in owners if type(owner) is LayerStack]
