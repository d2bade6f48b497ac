"""Linear layers, embeddings and experts whose weights stay in quantized blocks, and their installation in a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gpu_worker.light_imports import drawing_nothing_on_meta
from gpu_worker.quantised.expert_blocks import ExpertBlocks, blocks_of, fitting_parameters
from gpu_worker.quantised.index import MappedWeights
from gpu_worker.quantised.panels import KeptPanels
from lora_kernels import ops
from protocol.wire.errors import BadRequest


class BlockLinear(nn.Module):
    """x @ weight.T + bias with a quantized weight, computed with the dequantized values."""

    def __init__(
        self, weight: ops.QuantisedWeight, bias: Tensor | None, impl: ops.Impl | None, packed: ops.QuantisedLinear
    ) -> None:
        """bias: [N], in the dtype of the computation. packed: the weight, packed for `impl`."""
        super().__init__()
        self.out_features, self.in_features = weight.out_features, weight.in_features
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.packed = packed
        self._impl: ops.Impl | None = impl
        # Puts the kind into the model's fingerprint.
        self.register_buffer(weight.kind, torch.empty(self.out_features, self.in_features, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output [..., N] for x [..., K]."""
        rows = x.reshape(-1, x.shape[-1])
        bias = None if self.bias is None else self.bias.detach()
        return ops.linear(rows, self.packed, bias, impl=self._impl).view(*x.shape[:-1], self.out_features)


def beside_each_other(linears: list[BlockLinear]) -> ops.QuantisedLinear:
    """Return the weights of layers with a common input as one operand, which shares their memory."""
    parts = [linear.packed for linear in linears]
    return ops.QuantisedLinear(
        [weight for part in parts for weight in part.weights],
        [panels for part in parts for panels in part.panels],
        [form for part in parts for form in part.forms],
        [size for part in parts for size in part.sizes],
        parts[0].in_features,
        parts[0].int8_inputs,
    )


def round_inputs_of(model: nn.Module, *, is_required: bool = False) -> None:
    """Make a model's quantized linear layers and experts round their inputs to int8, in groups of 32.

    Experts do so if `compute_with_blocks` is called afterwards.
    is_required: raise BadRequest if no layer is quantized.
    """
    linears = [module for module in model.modules() if isinstance(module, BlockLinear)]
    if is_required and not linears:
        raise BadRequest(
            "quantize_activations is on, but no linear layer of this model is in GGUF's blocks:"
            " name a GGUF file, or set quantization"
        )
    for linear in linears:
        linear.packed = replace(linear.packed, int8_inputs=True)
    for module in model.modules():
        for blocks in blocks_of(module).values():
            blocks.packed = replace(blocks.packed, int8_inputs=True)


def has_rounded_inputs(model: nn.Module) -> bool:
    """Return whether `round_inputs_of` has changed a model."""
    return any(isinstance(module, BlockLinear) and module.packed.int8_inputs for module in model.modules())


class BlockEmbedding(nn.Module):
    """An embedding with a quantized weight, of which only requested rows are dequantized."""

    def __init__(self, weight: ops.QuantisedWeight, dtype: torch.dtype, scale: Tensor | None) -> None:
        """scale: factor on the rows, None for none."""
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.out_features, weight.in_features
        self._weight = weight
        self._dtype = dtype
        self._scale = None if scale is None else scale.to(dtype)
        self.register_buffer(weight.kind, torch.empty(self.num_embeddings, self.embedding_dim, device="meta"))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the rows [..., D] of token ids."""
        rows = self._weight.dequantise(input_ids).to(self._dtype)
        return rows if self._scale is None else rows * self._scale


def fill_model(
    model: PreTrainedModel, weights: MappedWeights, panels: KeptPanels, dtype: torch.dtype, impl: ops.Impl | None = None
) -> PreTrainedModel:
    """Fill a model whose parameters are on the meta device with a folder's weights. Return it in eval mode.

    Quantized weights of linear layers, embeddings and fused experts stay quantized; all others are converted to
    `dtype`. Raises BadRequest for weights that do not fit the model. Experts in blocks are not computed before
    `gpu_worker.layers.expert_modules.compute_with_blocks`.
    """
    held = _fill_experts(model, weights, panels, dtype, impl)
    for name, module in [*model.named_modules()]:
        source = _source(model, name, weights)
        if source is None or not weights.is_quantised(source):
            continue
        parent, _, child = name.rpartition(".")
        if type(module) is nn.Linear:
            bias = weights.numbers(f"{name}.bias", dtype) if module.bias is not None else None
            blocks = weights.blocks(source)
            made = BlockLinear(blocks, bias, impl, panels.pack(name, blocks, impl))
            shape, wanted = (made.out_features, made.in_features), (module.out_features, module.in_features)
        elif isinstance(module, nn.Embedding):
            made = BlockEmbedding(weights.blocks(source), dtype, getattr(module, "embed_scale", None))
            shape, wanted = (made.num_embeddings, made.embedding_dim), (module.num_embeddings, module.embedding_dim)
        else:
            raise BadRequest(f"{source} is quantised, and no linear layer or embedding")
        _check_shape(source, shape, wanted)
        setattr(model.get_submodule(parent), child, made)
    for name, parameter in [*model.named_parameters(remove_duplicate=False)]:
        if parameter.is_meta and name not in held:
            owner, _, own = name.rpartition(".")
            module = model.get_submodule(owner)
            source = _source(model, owner, weights) if own == "weight" else name
            if source is None or source not in weights.index.tensors:
                raise BadRequest(f"the quantised weights lack the model's tensor {name}")
            numbers = weights.numbers(source, dtype)
            _check_shape(source, tuple(numbers.shape), tuple(parameter.shape))
            module.register_parameter(own, nn.Parameter(numbers, requires_grad=False))
    _divide_frequencies(model, weights)
    return model.eval().requires_grad_(False)


def _fill_experts(
    model: PreTrainedModel, weights: MappedWeights, panels: KeptPanels, dtype: torch.dtype, impl: ops.Impl | None
) -> set[str]:
    """Give modules of experts the parameters that stay in blocks. Return their names. Raises BadRequest for shapes."""
    found: set[str] = set()
    for name, module in model.named_modules():
        held: dict[str, ExpertBlocks] = {}
        for own, parameter in fitting_parameters(module).items():
            source = f"{name}.{own}"
            if not weights.is_quantised(source):
                continue
            _check_shape(source, weights.index.tensors[source].shape, tuple(parameter.shape))
            blocks = weights.blocks(source)
            held[own] = ExpertBlocks(blocks, panels.pack(source, blocks, impl), len(parameter), dtype, impl)
            # Puts the kind into the model's fingerprint.
            module.register_buffer(f"{own}_{blocks.kind}", torch.empty(parameter.shape, device="meta"))
            found.add(source)
        if held:
            vars(module)["expert_blocks"] = held
    return found


def _source(model: PreTrainedModel, name: str, weights: MappedWeights) -> str | None:
    """Return the tensor for a module's weight: its own, or the embedding's for a tied head; None if there is none."""
    own = f"{name}.weight"
    if own in weights.index.tensors:
        return own
    head: Any = model.get_output_embeddings()
    if model.config.get_text_config().tie_word_embeddings and head is model.get_submodule(name):
        embedding = model.get_input_embeddings()
        return next((f"{other}.weight" for other, module in model.named_modules() if module is embedding), None)
    return None


def _check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise BadRequest(f"{name} has the shape {[*found]}, the model wants {[*wanted]}")


def _divide_frequencies(model: PreTrainedModel, weights: MappedWeights) -> None:
    """Divide rotary frequencies by the factors in the file, as GGUF stores Llama 3's scaling for longer texts."""
    if not weights.index.rope_factors:
        return
    factors = weights.numbers(weights.index.rope_factors, torch.float32)
    for module in model.modules():
        own = dict(module.named_buffers(recurse=False))
        if "inv_freq" in own:
            _check_shape(weights.index.rope_factors, tuple(factors.shape), tuple(own["inv_freq"].shape))
            module.inv_freq = own["inv_freq"] / factors


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Put parameters of modules created in the block on the meta device; buffers are computed as usual."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None:
            self._parameters[name] = type(param)(param.to("meta"), requires_grad=False)

    nn.Module.register_parameter = on_meta
    try:
        with drawing_nothing_on_meta():
            yield
    finally:
        nn.Module.register_parameter = register
