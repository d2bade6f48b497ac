"""Finds the blocks that most decoders share and replaces them with those of `blocks`.

A block is recognized by its parts, never by the model's name. It is replaced only after the replacement gave the same
result on the original's own input, at this start or an earlier one. Unrecognized blocks stay in Hugging Face's version.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gpu_worker.layers.activations import find_activation
from gpu_worker.layers.adaptable_modules import AdaptableModules, is_norm
from gpu_worker.layers.attention import PagedLayer, StepContext
from gpu_worker.layers.blocks import (
    PLAIN_OUTPUTS,
    Angles,
    CalledMlp,
    DeltaMixer,
    GatedMlp,
    LayerStack,
    Norm,
    PlainDecoder,
    PlainModel,
    PreNormLayer,
    RotaryAttention,
)
from gpu_worker.layers.lora import SharedInput, SiteLinear
from gpu_worker.layers.mixers import ChunkScan, Convolution, DeltaRule, MixerStates
from gpu_worker.layers.scan_mixer import ScanMixer
from gpu_worker.model.agreement import agrees, close
from gpu_worker.model.trial import NUM_HEAD_ROWS, NUM_TOKENS, ModuleCall, Trial
from lora_kernels import ops

Block = RotaryAttention | DeltaMixer | ScanMixer | GatedMlp | PreNormLayer


@dataclass(slots=True)
class _Found:
    """The blocks installed in a model so far, by the module that each replaces."""

    context: StepContext
    mixers: MixerStates
    known: Collection[str] | None  # shortcuts that agreed at an earlier start
    agreed: set[str] = field(default_factory=set)
    norms: dict[nn.Module, Norm] = field(default_factory=dict)
    blocks: dict[nn.Module, Block] = field(default_factory=dict)

    def agrees(self, what: str, module: nn.Module, block: Any, call: ModuleCall, **how: bool) -> bool:
        """Return whether a block computes the same as a module. what: a name for the pair. how: options of `agrees`."""
        if self.known is None:
            result = agrees(module, block, call, self.context, self.mixers, **how)
        else:
            result = what in self.known
        if result:
            self.agreed.add(what)
        return result


def install_shortcuts(
    model: nn.Module,
    trial: Trial,
    layers: list[PagedLayer],
    mixers: MixerStates,
    adaptable: AdaptableModules,
    impl: ops.Impl | None,
    known: Collection[str] | None = None,
    max_positions: int = 0,
) -> tuple[int, PlainModel | None, frozenset[str]]:
    """Replace the recognized blocks of a model whose linear layers are sites.

    The KV cache must hold the trial's tokens, and the states one sequence and an empty one. known: names of agreed
    blocks from an earlier start of the same model, which are then not compared again. max_positions: maximum length of
    a sequence, 0: unknown. Returns the number of decoder layers replaced as a whole; the object that steps call instead
    of the model, None for the model itself; and the names of the blocks that agreed.
    """
    found = _Found(adaptable.context, mixers, known)
    for module in model.modules():
        norm = find_norm(module, impl)
        if norm is not None:
            found.norms[module] = norm
            norm.adaptable, norm.context = adaptable.norm_of(module), adaptable.context
            module.forward = norm.forward
    num_calls = Counter(layer.call.module for layer in layers)
    by_module = {layer.call.module: layer for layer in layers if num_calls[layer.call.module] == 1 and not layer.owner}
    # Inner blocks come first: a layer is recognized by the blocks found for its children.
    for name, call in sorted(trial.modules.items(), key=lambda item: -item[0].count(".")):
        module = model.get_submodule(name)
        called = trial.mixer_modules.get(name, [])
        for number, candidate in enumerate(_candidates(module, by_module.get(module), called, found, impl)):
            # For one token, a delta rule's output is a multiple of the value, often close to zero, which the norm
            # amplifies.
            is_part = isinstance(candidate, (RotaryAttention, GatedMlp))
            if found.agrees(f"{name} {number}", module, candidate, call, large_inputs=is_part):
                module.forward = candidate.forward
                found.blocks[module] = candidate
                break
    decoders = _install_stacks(model, trial, found, impl, max_positions)
    plain = _plain_model(model, decoders, found)
    return sum(type(block) is PreNormLayer for block in found.blocks.values()), plain, frozenset(found.agreed)


# ---------------------------------------------------------------- single blocks


def _candidates(
    module: nn.Module, layer: PagedLayer | None, called: list[int], found: _Found, impl: ops.Impl | None
) -> Iterator[Block]:
    """Yield the blocks that may replace a module, judging by its children.

    layer: its attention, if it calls any. called: indexes of its calls among the mixers'.
    """
    children = list(module.children())
    shared = {child.shared for child in children if isinstance(child, SiteLinear)}
    shared = sorted(shared, key=lambda inputs: inputs.position)
    own_norms = [found.norms[child] for child in children if child in found.norms]
    if layer is not None and len(shared) == 2 and shared[0].num_siblings in (1, 3) and shared[1].num_siblings == 1:
        gate_width = sum(shared[0].sizes) - sum(layer.call.widths)
        gated = shared[0].num_siblings == 3 and gate_width == layer.call.num_heads * layer.call.value_dim
        if len(own_norms) in (0, 2) and (gate_width == 0 or (gated and _is_native(layer))):
            yield RotaryAttention(layer, shared[0], shared[1], tuple(own_norms), is_gated=gate_width > 0)
    elif called:
        delta = _delta_mixer(module, called, shared, own_norms, found.mixers)
        scan = _scan_mixer(module, called, shared, found.mixers)
        yield from (mixer for mixer in (delta, scan) if mixer is not None)
    elif layer is None and len(shared) == 2 and shared[0].num_siblings <= 2 and shared[1].num_siblings == 1:
        act = find_activation(module)
        if act is not None and sum(shared[0].sizes) == 2 * shared[1].in_features:
            yield GatedMlp(shared[0], shared[1], act, impl)
    elif len(own_norms) == 2:
        blocks = [found.blocks[child] for child in children if child in found.blocks]
        attentions = [block for block in blocks if isinstance(block, (RotaryAttention, DeltaMixer))]
        mlps = [block for block in blocks if isinstance(block, GatedMlp)]
        others = [child for child in children if child not in found.norms and child not in found.blocks]
        if not mlps and len(blocks) == len(others) == 1:
            mlps = [CalledMlp(others[0])]
        if len(attentions) == 1 and len(mlps) == 1:
            yield PreNormLayer(attentions[0], mlps[0], *own_norms)
            yield PreNormLayer(attentions[0], mlps[0], *reversed(own_norms))


def _is_native(layer: PagedLayer) -> bool:
    return layer.k_cache is not None and ops.is_native(layer.k_cache)


def _delta_mixer(
    module: nn.Module, called: list[int], shared: list[SharedInput], norms: list[Norm], mixers: MixerStates
) -> DeltaMixer | None:
    """Return the gated delta rule that may replace a module; None if its parts differ or have no native code."""
    convolutions = [child for child in module.children() if type(child) is nn.Conv1d]
    own = dict(module.named_parameters(recurse=False))
    if [type(mixers.calls[i]) for i in called] != [Convolution, DeltaRule] or len(convolutions) != 1:
        return None
    if [inputs.num_siblings for inputs in shared] != [4, 1] or len(norms) != 1 or own.keys() != {"A_log", "dt_bias"}:
        return None
    if not ops.is_native(convolutions[0].weight):
        return None
    rates, dt_bias = -own["A_log"].detach().float().exp(), own["dt_bias"].detach().float()
    return DeltaMixer(mixers, called[0], shared[0], shared[1], norms[0], convolutions[0], rates, dt_bias)


def _scan_mixer(
    module: nn.Module, called: list[int], shared: list[SharedInput], mixers: MixerStates
) -> ScanMixer | None:
    """Return the Mamba2 mixer that may replace a module; None if its parts differ or have no native code."""
    convolutions = [child for child in module.children() if type(child) is nn.Conv1d]
    norms = [child for child in module.children() if is_norm(child)]
    own = dict(module.named_parameters(recurse=False))
    calls = [mixers.calls[i] for i in called]
    if [type(call) for call in calls] != [Convolution, ChunkScan] or len(convolutions) != 1 or len(norms) != 1:
        return None
    if [inputs.num_siblings for inputs in shared] != [1, 1] or own.keys() != {"A_log", "D", "dt_bias"}:
        return None
    if calls[1].tells_prompts_apart or not ops.is_native(convolutions[0].weight):
        return None
    return ScanMixer(mixers, called[0], module, shared[0], shared[1], convolutions[0], norms[0])


def find_norm(module: nn.Module, impl: ops.Impl | None) -> Norm | None:
    """Return the RMSNorm, gated or not, that computes the same as a module; None if there is none."""
    parameters = list(module.named_parameters(recurse=False))
    if [name for name, _ in parameters] != ["weight"] or next(module.children(), None) is not None:
        return None
    num_gates = len(inspect.signature(module.forward).parameters) - 1
    weight = parameters[0][1].detach()
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight.ndim != 1 or not isinstance(eps, float) or num_gates > 1:
        return None
    generator = torch.Generator().manual_seed(0)
    x, gate = torch.randn(2, 3, len(weight), generator=generator).to(weight.device)
    x *= eps**0.5  # so small that eps matters
    inputs = (x, gate)[: 1 + num_gates]
    try:
        expected = module(*inputs)
    except Exception:  # noqa: BLE001  any module with one vector is tried, and may raise anything
        return None
    for plus_one in (False, True):
        got = Norm(weight.float(), eps, plus_one=plus_one, impl=impl).forward(*inputs)
        if isinstance(expected, Tensor) and close(got, expected, 1e-4):
            return Norm(weight, eps, plus_one=plus_one, impl=impl)
    return None


# ---------------------------------------------------------------- stacks of layers


def _install_stacks(
    model: nn.Module, trial: Trial, found: _Found, impl: ops.Impl | None, max_positions: int
) -> list[PlainDecoder]:
    """Run lists of pre-norm layers as one call where the surrounding module then gives bit-identical results.

    Identical, because a difference as small as that of another rotary embedding is not rounding: a stack runs the same
    operations as its layers. Returns the decoders that now run without Hugging Face's code.
    """
    decoders: list[PlainDecoder] = []
    for name, module in model.named_modules():
        children = list(module.children())
        layers = [block for child in children if isinstance(block := found.blocks.get(child), PreNormLayer)]
        holder = name.rpartition(".")[0]
        if len(children) < 2 or len(layers) < len(children) or holder not in trial.modules:
            continue
        stack = LayerStack(layers, impl)
        stacked = _StackedHolder(model.get_submodule(holder), children, stack)
        call = trial.modules[holder]
        if found.agrees(f"{name} as a stack", stacked.holder, stacked, call, exact=True):
            stacked.install()
            for number, decoder in enumerate(_plain_decoders(stacked.holder, stack, found, max_positions)):
                if found.agrees(f"{name} as a decoder {number}", stacked.holder, decoder, call, exact=True):
                    stacked.holder.forward = decoder.forward
                    decoders.append(decoder)
                    break
    return decoders


def _plain_model(model: nn.Module, decoders: list[PlainDecoder], found: _Found) -> PlainModel | None:
    """Return a replacement for the whole model, if it is a plain decoder with a linear head; else None."""
    children = list(model.children())
    heads = [child.shared for child in children if isinstance(child, SiteLinear)]
    if not len(decoders) == len(heads) == 1 or len(children) != 2 or decoders[0].module not in children:
        return None
    plain = PlainModel(decoders[0], found.norms[decoders[0].norm], heads[0])
    ids = torch.arange(NUM_TOKENS, device=decoders[0].stack.layers[0].first.weight.device)
    call = ModuleCall(
        (),
        {"input_ids": ids[None], "position_ids": ids[None], "use_cache": False, "logits_to_keep": ids[:NUM_HEAD_ROWS]},
    )
    if found.agrees("the whole model", model, plain, call, exact=True):
        return plain
    decoders[0].stack.ends = None
    return None


def _plain_decoders(holder: nn.Module, stack: LayerStack, found: _Found, max_positions: int) -> Iterator[PlainDecoder]:
    """Yield the decoders that may replace a module around a stack, judging by its other children."""
    children = [child for child in holder.children() if not isinstance(child, nn.ModuleList)]
    norms = [child for child in children if child in found.norms]
    rotaries = [child for child in children if "inv_freq" in dict(child.named_buffers(recurse=False))]
    embeddings = [child for child in children if child not in norms and child not in rotaries]
    if len(norms) == len(rotaries) == len(embeddings) == 1:
        for outputs in PLAIN_OUTPUTS:
            yield PlainDecoder(holder, embeddings[0], Angles(rotaries[0], max_positions), stack, norms[0], outputs)


class _StackedHolder:
    """The module around a list of layers that a stack replaces."""

    def __init__(self, holder: nn.Module, layers: list[nn.Module], stack: LayerStack) -> None:
        self.holder = holder
        self._layers = layers
        self._stack = stack

    def install(self) -> None:
        """Replace the first layer with the stack; the others return their input."""
        self._layers[0].forward = self._stack.forward
        for layer in self._layers[1:]:
            layer.forward = _pass_on

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the holder with the stack installed, then restore its layers."""
        before = [layer.forward for layer in self._layers]
        self.install()
        try:
            return self.holder.forward(*args, **kwargs)
        finally:
            for layer, forward in zip(self._layers, before, strict=True):
                layer.forward = forward


def _pass_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    """Return the hidden states unchanged: the stack has already applied this layer."""
    return hidden_states
