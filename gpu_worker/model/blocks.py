"""The blocks that most decoders share, as a few native operations each instead of many small ones.

Each stands in a model for the modules that `shortcuts` recognises. Rows are a step's packed tokens: [T, width].
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from gpu_worker.model.apply_extras import AdaptableModule
from gpu_worker.model.attention import PagedLayer, StepContext
from gpu_worker.model.lora import SharedInput
from lora_kernels import ops


class Norm:
    """RMSNorm: see `ops.rms_norm`."""

    def __init__(self, weight: Tensor, eps: float, *, plus_one: bool, impl: ops.Impl | None) -> None:
        self.weight = weight
        self.eps = eps
        self.plus_one = plus_one
        self.impl: ops.Impl | None = impl
        self.adaptable: AdaptableModule | None = None  # None: no adapter may replace the weight
        self.context = StepContext()

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of x [..., D]."""
        # Heads cut from a fused projection, or transposed, are copied: the operation wants rows at one stride.
        rows = x.reshape(-1, x.shape[-1])
        out = ops.rms_norm(rows, self.weight, self.eps, plus_one=self.plus_one, impl=self.impl)
        return self._finish(out.view(x.shape), x)

    @property
    def constants(self) -> ops.RmsNorm:
        """The norm as an operation over whole layers takes it."""
        return ops.RmsNorm(self.weight, self.eps, self.plus_one)

    def add_forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual += x, in place; return the norm of the sum. x, residual: [T, D]."""
        out = ops.rms_norm(x, self.weight, self.eps, residual=residual, plus_one=self.plus_one, impl=self.impl)
        return self._finish(out, residual)

    def _finish(self, out: Tensor, x: Tensor) -> Tensor:
        if self.context.extras and self.adaptable is not None:
            self.adaptable.apply_norms(self.context.extras, out, x)
        return out


class GatedMlp:
    """down(act(gate(x)) * up(x))."""

    def __init__(self, gate_up: SharedInput, down: SharedInput, act: ops.Activation, impl: ops.Impl | None) -> None:
        """gate_up: two siblings, or one linear layer whose output holds the gate, then up."""
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


class RotaryAttention:
    """out(attention(rotary(qkv(x)))), in some models with RMSNorm of each head's queries and keys before `rotary`."""

    def __init__(self, layer: PagedLayer, qkv: SharedInput, out: SharedInput, norms: tuple[Norm, Norm] | None) -> None:
        """qkv: three siblings, or one linear layer whose output holds q, k, v. norms: of the heads' q and k."""
        self.layer = layer
        self.qkv = qkv
        self.out = out
        self.norms = norms

    def run(self, rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the output [T, width] for rows [T, width]. cos, sin: [T, R], as `ops.rotary_` takes them."""
        call = self.layer.call
        outs = self.qkv.project(rows)
        q, k, v = outs if len(outs) == 3 else outs[0].split(call.widths, dim=-1)
        q = q.view(-1, call.num_heads, call.head_dim)
        k = k.view(-1, call.num_kv_heads, call.head_dim)
        v = v.view(-1, call.num_kv_heads, call.value_dim)
        if self.norms is not None:
            q, k = self.norms[0].forward(q), self.norms[1].forward(k)
        ops.rotary_(q, k, cos, sin, impl=self.layer.impl)
        attended = self.layer.attend(q, k, v, call.scale, call.softcap, call.sinks)
        return self.out.project(attended.view(len(rows), -1))[0]

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], *_: Any, **__: Any
    ) -> tuple[Tensor, None]:
        """Return the output for hidden_states [1, T, width], as the model calls it."""
        cos, sin = position_embeddings
        out = self.run(hidden_states.view(-1, hidden_states.shape[-1]), cos[0], sin[0])
        return out.view(*hidden_states.shape[:-1], out.shape[-1]), None


class PreNormLayer:
    """x += attention(norm(x)); x += mlp(norm(x)). Changes its input in place."""

    def __init__(self, attention: RotaryAttention, mlp: GatedMlp, first: Norm, second: Norm) -> None:
        self.attention = attention
        self.mlp = mlp
        self.first = first
        self.second = second

    def forward(self, hidden_states: Tensor, *_: Any, position_embeddings: tuple[Tensor, Tensor], **__: Any) -> Tensor:
        """Return hidden_states [1, T, width], changed in place."""
        rows = hidden_states.view(-1, hidden_states.shape[-1])
        cos, sin = position_embeddings
        attended = self.attention.run(self.first.forward(rows), cos[0], sin[0])
        rows += self.mlp.run(self.second.add_forward(attended, rows))
        return hidden_states

    @property
    def is_opaque(self) -> bool:
        """Whether some linear layer can only be called, which rules out one operation over the whole layer."""
        mine = (self.attention.qkv, self.attention.out, self.mlp.gate_up, self.mlp.down)
        return any(inputs.is_opaque for inputs in mine)

    @property
    def constants(self) -> ops.DecoderLayer:
        """The layer as `ops.decoder_stack` takes it. The KV cache must be allocated, and no part opaque."""
        attention, mlp, norms = self.attention, self.mlp, self.attention.norms
        return ops.DecoderLayer(
            attention_norm=self.first.constants,
            mlp_norm=self.second.constants,
            head_norms=(norms[0].constants, norms[1].constants) if norms else None,
            qkv=attention.qkv.linears,
            attention=attention.layer.attention,
            out=attention.out.linears,
            gate_up=mlp.gate_up.linears,
            act=mlp.act,
            down=mlp.down.linears,
        )


class LayerStack:
    """Consecutive pre-norm layers as one call; it stands in the model for the first of them."""

    def __init__(self, layers: list[PreNormLayer], impl: ops.Impl | None) -> None:
        self.layers = layers
        self.impl: ops.Impl | None = impl
        self.one_call = True  # False: the layers run one by one, so that a profile shows their parts
        self._stack: ops.DecoderStack | None = None
        self._built_for: tuple[object, object] = (None, None)  # the KV cache and adapter table that `_stack` holds

    def forward(self, hidden_states: Tensor, *_: Any, position_embeddings: tuple[Tensor, Tensor], **__: Any) -> Tensor:
        """Return hidden_states [1, T, width], changed in place by all layers."""
        first = self.layers[0].attention
        table = first.qkv.table
        if self._built_for[0] is not first.layer.k_cache or self._built_for[1] is not table:
            self._stack = ops.decoder_stack([layer.constants for layer in self.layers], impl=self.impl)
            self._built_for = (first.layer.k_cache, table)
        context = first.layer.context
        if self._stack is None or not self.one_call or any(group.extras.in_layers for group in context.extras):
            for layer in self.layers:
                layer.forward(hidden_states, position_embeddings=position_embeddings)
            return hidden_states
        assert context.attention is not None
        cos, sin = position_embeddings
        rows = hidden_states.view(-1, hidden_states.shape[-1])
        self._stack.run(rows, cos[0], sin[0], context.attention, table, context.lora)
        return hidden_states


class PlainDecoder:
    """norm(stack(embedding(ids))), without what Hugging Face does around it for other uses.

    Masks, caches, records of outputs and a call of every layer take half a millisecond a step, whatever its size.
    """

    def __init__(
        self, module: nn.Module, embedding: nn.Module, rotary: nn.Module, stack: LayerStack, norm: nn.Module
    ) -> None:
        """embedding, rotary, norm: parts of `module`, the decoder whose own forward computes calls of another kind."""
        self.embedding = embedding
        self.rotary = rotary
        self.stack = stack
        self.norm = norm
        self._forward = module.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the hidden states of input_ids and position_ids [1, T]; with other arguments what the decoder does."""
        ids, positions = kwargs.get("input_ids"), kwargs.get("position_ids")
        num_asked = sum(value is not None and value is not False for value in kwargs.values())
        if args or ids is None or positions is None or num_asked > 2:
            return self._forward(*args, **kwargs)
        hidden = self.embedding(ids)
        hidden = self.stack.forward(hidden, position_embeddings=self.rotary(hidden, position_ids=positions))
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


def stacks_of(model: nn.Module) -> list[LayerStack]:
    """Return the stacks installed in a model."""
    owners = [getattr(module.forward, "__self__", None) for module in model.modules()]
    return [owner for owner in owners if type(owner) is LayerStack]
