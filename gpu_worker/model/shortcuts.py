"""Shorter ways through the blocks that most decoders share: a few native operations instead of many small ones.

A block is recognised by what it is made of, never by its model's name, and replaced only after the replacement has
computed what the original computes, on the original's own input. What is not recognised stays as Hugging Face wrote it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from gpu_worker.adapters.extras import ModulePlace
from gpu_worker.model.attention import PagedLayer, StepContext
from gpu_worker.model.lora import SharedInput, SiteLinear
from gpu_worker.model.places import Places
from gpu_worker.model.trial import NUM_TOKENS, ModuleCall, Trial
from lora_kernels import ops

logger = logging.getLogger(__name__)

LOUD = 32.0
"""How much larger the numbers of the second comparison are, so that a block that clips them is found out."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference allowed between a block and its shortcut, relative to the largest output: rounding only."""

_ACTIVATIONS: dict[ops.Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class Norm:
    """RMSNorm."""

    def __init__(self, weight: Tensor, eps: float, *, plus_one: bool, impl: ops.Impl | None) -> None:
        self.weight = weight
        self.eps = eps
        self.plus_one = plus_one
        self.impl: ops.Impl | None = impl
        self.place: ModulePlace | None = None  # where adapters may replace the weight
        self.context = StepContext()

    def forward(self, x: Tensor) -> Tensor:
        # Heads cut from a fused projection, or transposed, are copied: the operation wants rows at one stride.
        rows = x.reshape(-1, x.shape[-1])
        out = ops.rms_norm(rows, self.weight, self.eps, plus_one=self.plus_one, impl=self.impl)
        return self._finish(out.view(x.shape), x)

    @property
    def norm(self) -> ops.RmsNorm:
        return ops.RmsNorm(self.weight, self.eps, self.plus_one)

    def add_forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual += x, in place, and normalize the sum."""
        out = ops.rms_norm(x, self.weight, self.eps, residual=residual, plus_one=self.plus_one, impl=self.impl)
        return self._finish(out, residual)

    def _finish(self, out: Tensor, x: Tensor) -> Tensor:
        if self.context.extras and self.place is not None:
            self.place.apply_norms(self.context.extras, out, x)
        return out


class GatedMlp:
    """down(act(gate(x)) * up(x))."""

    def __init__(self, gate_up: SharedInput, down: SharedInput, act: ops.Activation, impl: ops.Impl | None) -> None:
        self.gate_up = gate_up
        self.down = down
        self.act: ops.Activation = act
        self.impl: ops.Impl | None = impl

    def run(self, rows: Tensor) -> Tensor:
        outs = self.gate_up.project(rows)
        gate, up = outs if len(outs) == 2 else outs[0].chunk(2, dim=-1)
        return self.down.project(ops.gated_act(gate, up, self.act, impl=self.impl))[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x.view(-1, x.shape[-1])).view(x.shape)


class RotaryAttention:
    """Projections, in some models RMSNorm of queries and keys, rotary embedding, paged attention, output projection."""

    def __init__(self, layer: PagedLayer, qkv: SharedInput, out: SharedInput, norms: tuple[Norm, Norm] | None) -> None:
        self.layer = layer
        self.qkv = qkv
        self.out = out
        self.norms = norms

    def run(self, rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
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
        rows = hidden_states.view(-1, hidden_states.shape[-1])
        cos, sin = position_embeddings
        attended = self.attention.run(self.first.forward(rows), cos[0], sin[0])
        rows += self.mlp.run(self.second.add_forward(attended, rows))
        return hidden_states

    @property
    def is_opaque(self) -> bool:
        """Whether some of its linear layers cannot be taken apart, which one call for everything would need."""
        mine = (self.attention.qkv, self.attention.out, self.mlp.gate_up, self.mlp.down)
        return any(inputs.is_opaque for inputs in mine)

    @property
    def layer(self) -> ops.DecoderLayer:
        attention, mlp, norms = self.attention, self.mlp, self.attention.norms
        return ops.DecoderLayer(
            attention_norm=self.first.norm,
            mlp_norm=self.second.norm,
            head_norms=(norms[0].norm, norms[1].norm) if norms else None,
            qkv=attention.qkv.linears,
            attention=attention.layer.attention,
            out=attention.out.linears,
            gate_up=mlp.gate_up.linears,
            act=mlp.act,
            down=mlp.down.linears,
        )


class LayerStack:
    """Pre-norm layers that follow each other, as one call; stands in the model for the first of them."""

    def __init__(self, layers: list[PreNormLayer], impl: ops.Impl | None) -> None:
        self.layers = layers
        self.impl: ops.Impl | None = impl
        self.one_call = True  # False: one by one, for who wants to see the parts
        self._stack: ops.DecoderStack | None = None
        self._built_for: tuple[object, object] = (None, None)  # KV cache and adapter table the stack knows

    def forward(self, hidden_states: Tensor, *_: Any, position_embeddings: tuple[Tensor, Tensor], **__: Any) -> Tensor:
        first = self.layers[0].attention
        table = first.qkv.table
        if self._built_for[0] is not first.layer.k_cache or self._built_for[1] is not table:
            self._stack = ops.decoder_stack([layer.layer for layer in self.layers], impl=self.impl)
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


def stacks_of(model: nn.Module) -> list[LayerStack]:
    """Return the stacks that stand in a model."""
    owners = [getattr(module.forward, "__self__", None) for module in model.modules()]
    return [owner for owner in owners if type(owner) is LayerStack]


def _pass_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    """The forward of a layer whose work the stack before it has done."""
    return hidden_states


def install_shortcuts(
    model: nn.Module, trial: Trial, layers: list[PagedLayer], places: Places, impl: ops.Impl | None
) -> int:
    """Replace the recognised blocks of a model whose linear layers are sites. Returns how many layers are whole ones.

    The caches must have room for the trial's tokens.
    """
    norms: dict[nn.Module, Norm] = {}
    for module in model.modules():
        norm = find_norm(module, impl)
        if norm is not None:
            norms[module] = norm
            norm.place, norm.context = places.norm_of(module), places.context
            module.forward = norm.forward
    num_calls = Counter(layer.call.module for layer in layers)
    by_module = {layer.call.module: layer for layer in layers if num_calls[layer.call.module] == 1 and not layer.owner}
    blocks: dict[nn.Module, Any] = {}
    # Inner blocks come first: a layer is recognised by the shortcuts found for what it holds.
    for name, call in sorted(trial.modules.items(), key=lambda item: -item[0].count(".")):
        module = model.get_submodule(name)
        for candidate in _candidates(module, by_module.get(module), norms, blocks, impl):
            if _agrees(module, candidate, call, places.context):
                module.forward = candidate.forward
                blocks[module] = candidate
                break
    _install_stacks(model, trial, blocks, places.context, impl)
    return sum(type(block) is PreNormLayer for block in blocks.values())


def _install_stacks(
    model: nn.Module, trial: Trial, blocks: dict[nn.Module, Any], context: StepContext, impl: ops.Impl | None
) -> None:
    """Let lists of pre-norm layers run as one call, where what holds them then computes what it computed before."""
    for name, module in model.named_modules():
        children = list(module.children())
        layers = [blocks.get(child) for child in children]
        holder = name.rpartition(".")[0]
        if len(layers) < 2 or holder not in trial.modules or any(type(layer) is not PreNormLayer for layer in layers):
            continue
        if any(layer is not None and layer.is_opaque for layer in layers):
            continue
        stack = LayerStack([layer for layer in layers if layer is not None], impl)
        stacked = _Stacked(model.get_submodule(holder), children, stack)
        if _agrees(stacked.holder, stacked, trial.modules[holder], context, exact=True):
            stacked.install()


class _Stacked:
    """What holds a list of layers, with the stack in their place while it runs."""

    def __init__(self, holder: nn.Module, layers: list[nn.Module], stack: LayerStack) -> None:
        self.holder = holder
        self._layers = layers
        self._stack = stack

    def install(self) -> None:
        self._layers[0].forward = self._stack.forward
        for layer in self._layers[1:]:
            layer.forward = _pass_on

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        before = [layer.forward for layer in self._layers]
        self.install()
        try:
            return self.holder.forward(*args, **kwargs)
        finally:
            for layer, forward in zip(self._layers, before, strict=True):
                layer.forward = forward


def _candidates(
    module: nn.Module, layer: PagedLayer | None, norms: dict[nn.Module, Norm], blocks: dict[nn.Module, Any],
    impl: ops.Impl | None,
) -> Iterator[GatedMlp | RotaryAttention | PreNormLayer]:  # fmt: skip
    """Yield what a module might be shortened to, judging by its children."""
    children = list(module.children())
    shared = {child.shared for child in children if isinstance(child, SiteLinear)}
    shared = sorted(shared, key=lambda inputs: inputs.position)
    own_norms = [norms[child] for child in children if child in norms]
    if layer is not None and len(shared) == 2 and shared[0].num_siblings in (1, 3) and shared[1].num_siblings == 1:
        pair = (own_norms[0], own_norms[1]) if len(own_norms) == 2 else None
        if len(own_norms) in (0, 2) and sum(shared[0].sizes) == sum(layer.call.widths):
            yield RotaryAttention(layer, shared[0], shared[1], pair)
    elif layer is None and len(shared) == 2 and shared[0].num_siblings <= 2 and shared[1].num_siblings == 1:
        act = _find_activation(module)
        if act is not None and sum(shared[0].sizes) == 2 * shared[1].in_features:
            yield GatedMlp(shared[0], shared[1], act, impl)
    elif len(own_norms) == 2:
        attentions = [blocks[child] for child in children if isinstance(blocks.get(child), RotaryAttention)]
        mlps = [blocks[child] for child in children if isinstance(blocks.get(child), GatedMlp)]
        if len(attentions) == 1 and len(mlps) == 1:
            yield PreNormLayer(attentions[0], mlps[0], *own_norms)
            yield PreNormLayer(attentions[0], mlps[0], *reversed(own_norms))


def find_norm(module: nn.Module, impl: ops.Impl | None) -> Norm | None:
    """Return the RMSNorm that computes exactly what a module computes, if there is one."""
    parameters = list(module.named_parameters(recurse=False))
    if [name for name, _ in parameters] != ["weight"] or next(module.children(), None) is not None:
        return None
    weight = parameters[0][1].detach()
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight.ndim != 1 or not isinstance(eps, float):
        return None
    generator = torch.Generator().manual_seed(0)
    # Small enough numbers that eps matters.
    x = (eps**0.5 * torch.randn(3, len(weight), generator=generator)).to(weight.device)
    try:
        expected = module(x)
    except Exception:  # noqa: BLE001 - not a norm: any module with one vector may stand here
        return None
    for plus_one in (False, True):
        norm = Norm(weight, eps, plus_one=plus_one, impl=impl)
        got = ops.rms_norm(x, weight.float(), eps, plus_one=plus_one, impl=impl)
        if isinstance(expected, Tensor) and _close(got, expected, 1e-4):
            return norm
    return None


def _find_activation(module: nn.Module) -> ops.Activation | None:
    """Return which activation function a module holds, as a child or an attribute."""
    x = torch.linspace(-6, 6, 101)
    held = [child for child in module.children() if next(child.parameters(), None) is None]
    held += [value for value in vars(module).values() if callable(value)]
    for value in held:
        try:
            y = value(x)
        except Exception:  # noqa: BLE001 - any attribute that can be called may stand here
            continue
        for name, function in _ACTIVATIONS.items():
            if isinstance(y, Tensor) and torch.allclose(y, function(x), rtol=1e-5, atol=1e-6):
                return name
    return None


def _agrees(module: nn.Module, shortcut: Any, call: ModuleCall, context: StepContext, *, exact: bool = False) -> bool:
    """Tell whether a shortcut computes what a module computes from the arguments of the trial run.

    Those of its parts are tried on large numbers too, with one token: then attention only passes the values on.
    """
    device = next(part.device for part in (*call.args, *call.kwargs.values()) if isinstance(part, Tensor))
    _set_tokens(context, NUM_TOKENS, device)
    if not _same(module, shortcut, call, exact=exact):
        return False
    if not isinstance(shortcut, (RotaryAttention, GatedMlp)):
        return True
    _set_tokens(context, 1, device)
    loud = ModuleCall(_loud(call.args), _loud(call.kwargs))
    return _same(module, shortcut, loud, exact=exact)


def _same(module: nn.Module, shortcut: Any, call: ModuleCall, *, exact: bool) -> bool:
    expected = module.forward(*_copies(call.args), **_copies(call.kwargs))
    try:
        got = shortcut.forward(*_copies(call.args), **_copies(call.kwargs))
    except (TypeError, ValueError, RuntimeError) as error:  # arguments or shapes that the shortcut does not take
        logger.debug("no shortcut for %s: %s", type(module).__name__, error)
        return False
    if type(got) is not type(expected):
        return False
    if isinstance(expected, (tuple, ModelOutput)):
        expected, got = expected[0], got[0]
    if not isinstance(got, Tensor) or not isinstance(expected, Tensor) or got.shape != expected.shape:
        return False
    # A stack runs what its layers run: a difference as small as another rotary embedding makes is not rounding.
    return torch.equal(got, expected) if exact else _close(got, expected, TOLERANCE[expected.dtype])


def _set_tokens(context: StepContext, num: int, device: torch.device) -> None:
    """Describe a step of `num` tokens of one sequence, in the first block."""
    num_tokens = np.array([num])
    context.attention = ops.build_attention_batch(num_tokens, num_tokens, np.zeros((1, 1), np.int32), device)


def _loud(values: Any) -> Any:
    """Return a module's arguments for their last token alone, the hidden states LOUD times as large.

    The first token may be padding. Hidden states have no tuple around them; rotary embeddings do, and stay as they are.
    """

    def cut(value: Any, factor: float) -> Any:
        if isinstance(value, tuple):
            return tuple(cut(part, 1.0) for part in value)
        if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[1] != NUM_TOKENS:
            return value
        return value[:, -1:] * factor if value.is_floating_point() else value[:, -1:]

    if isinstance(values, dict):
        return {key: cut(value, LOUD) for key, value in values.items()}
    return tuple(cut(value, LOUD) for value in values)


def _copies(values: Any) -> Any:
    """Copy the tensors of a module's arguments: shortcuts may change them."""
    if isinstance(values, Tensor):
        return values.clone()
    if isinstance(values, (tuple, list)):
        return type(values)(_copies(value) for value in values)
    if isinstance(values, dict):
        return {key: _copies(value) for key, value in values.items()}
    return values


def _close(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    if not expected.isfinite().all():  # too large for the dtype: no evidence
        return True
    difference = (got.float() - expected.float()).abs().max()
    return bool(difference <= tolerance * expected.float().abs().max())
