"""The modules that adapters may change: linear layers, embeddings, norms, modules with other parameters.

All but the linear layers are found in a trial run: a module is adaptable only if it is computed token by token, once
per step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gpu_worker.layers.apply_extras import AdaptableEmbedding, AdaptableModule, TokenLayout, original_forward
from gpu_worker.layers.attention import StepContext
from gpu_worker.layers.expert_modules import GroupedExperts, find_grouped_experts
from gpu_worker.layers.lora import SharedInput, SiteInfo, is_number
from lora_kernels import ops
from protocol.wire.messages import SiteShape


@dataclass(slots=True)
class AdaptableModules:
    """The adaptable modules of one model, by name."""

    context: StepContext
    linear: dict[str, tuple[SharedInput, int]] = field(default_factory=dict)  # the siblings, and the index among them
    embeddings: dict[str, AdaptableEmbedding] = field(default_factory=dict)
    norms: dict[str, AdaptableModule] = field(default_factory=dict)
    modules: dict[str, AdaptableModule] = field(default_factory=dict)  # modules with parameters that LoRA can address
    experts: dict[str, GroupedExperts] = field(default_factory=dict)  # `modules` whose LoRA is stored as pool rows

    def norm_of(self, module: nn.Module) -> AdaptableModule | None:
        """Return the adaptable norm of a module, None if the module is not one."""
        return next((norm for norm in self.norms.values() if norm.module is module), None)

    def parameter(self, name: str, parameter: str) -> Tensor | None:
        """Return a parameter of the base model; None for a missing bias. A linear layer's weight is always [N, K].

        Raises AdapterRefused for the weight of a quantized layer.
        """
        if name in self.linear:
            shared, index = self.linear[name]
            return shared.weight(index) if parameter == "weight" else shared.bias(index)
        if name in self.embeddings:
            return self.embeddings[name].numbers()
        found = self.norms.get(name) or self.modules[name]
        return found.parameter(parameter)

    def shapes(self, sites: list[SiteInfo]) -> list[SiteShape]:
        """Return what the fleet needs to know about each adaptable module to read adapters. sites: linear layers."""
        shapes = [SiteShape(s.name, s.in_features, s.out_features, s.kind, s.has_bias) for s in sites]
        for name, embedding in self.embeddings.items():
            lookup = embedding.module
            shapes.append(SiteShape(name, lookup.num_embeddings, lookup.embedding_dim, "embedding"))
        for name, norm in self.norms.items():
            width = len(norm.module.get_parameter("weight"))
            has_bias = norm.module._parameters.get("bias") is not None
            shapes.append(SiteShape(name, width, width, "norm", has_bias))
        for name, other in self.modules.items():
            shapes += parameter_shapes(name, other.module)
        return shapes

    def watch(self) -> None:
        """Make embeddings, norms without a shortcut, and modules with other parameters apply each step's extras."""
        for embedding in self.embeddings.values():
            embedding.module.forward = _watch_embedding(embedding, self.context)
        for norm in self.norms.values():
            if "forward" not in norm.module.__dict__:
                norm.module.forward = _watch_norm(norm, self.context)
        for name, other in self.modules.items():
            other.module.forward = _watch_parameters(other, self.experts.get(name), self.context)


def find_adaptable_modules(
    model: nn.Module,
    per_token: Mapping[str, TokenLayout],
    sites: list[SiteInfo],
    shared: list[SharedInput],
    context: StepContext,
    impl: ops.Impl | None = None,
    *,
    packs_experts: bool = True,
) -> AdaptableModules:
    """Find the adaptable modules of a model whose linear layers are `sites`.

    per_token: modules that the trial saw called once, token by token. shared: in the order of their sites. impl: for
    the operations on experts. packs_experts: see `find_grouped_experts`.
    """
    found = AdaptableModules(context)
    owners = [(inputs, i) for inputs in shared for i in range(inputs.num_siblings)]
    found.linear = {site.name: owner for site, owner in zip(sites, owners, strict=True)}
    for name, module in model.named_modules():
        if name not in per_token or name in found.linear:
            continue
        if isinstance(module, nn.Embedding):
            if _is_plain_lookup(module):
                found.embeddings[name] = AdaptableEmbedding(name, module)
        elif is_norm(module):
            found.norms[name] = AdaptableModule(name, module, per_token[name])
        elif _adaptable_parameters(module):
            found.modules[name] = AdaptableModule(name, module, per_token[name])
    found.experts = find_grouped_experts(found.modules, impl, packs=packs_experts)
    return found


def _adaptable_parameters(module: nn.Module) -> list[str]:
    """Return the names of a module's own parameters that PEFT's `target_parameters` can address, in module order."""
    if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
        return []
    return [
        name
        for name, parameter in module.named_parameters(recurse=False)
        if is_number(parameter) and (parameter.ndim == 2 or (parameter.ndim == 3 and len(parameter) > 1))
    ]


def parameter_shapes(name: str, module: nn.Module) -> list[SiteShape]:
    """Return what the fleet needs to know about a module's own parameters to read adapters for them."""
    return [_parameter_shape(name, module, parameter) for parameter in _adaptable_parameters(module)]


def _parameter_shape(name: str, module: nn.Module, parameter: str) -> SiteShape:
    weight = module.get_parameter(parameter)
    num_experts = len(weight) if weight.ndim == 3 else 0
    first, second = weight.shape[-2:]
    if weight.ndim == 3 and getattr(module, "is_transposed", False):
        return SiteShape(f"{name}.{parameter}", first, second, "parameter", num_experts=num_experts)
    return SiteShape(f"{name}.{parameter}", second, first, "parameter", num_experts=num_experts)


def is_norm(module: nn.Module) -> bool:
    """Return whether a module has a weight vector, perhaps a bias, and nothing else."""
    parameters = dict(module.named_parameters(recurse=False))
    vectors = all(parameter.ndim == 1 for parameter in parameters.values())
    names = set(parameters)
    return vectors and "weight" in names and names <= {"weight", "bias"} and next(module.children(), None) is None


def _is_plain_lookup(module: nn.Embedding) -> bool:
    """Return whether an embedding returns its rows, perhaps scaled, and nothing else."""
    if not is_number(module.weight):
        return False
    # In descending order: an embedding of positions may return the first rows, whatever its ids.
    ids = torch.arange(min(3, module.num_embeddings), device=module.weight.device).flip(0)[None]
    try:
        found = original_forward(module)(ids)
    except Exception:  # noqa: BLE001  a subclass may need any arguments, and raise anything without them
        return False
    scale = getattr(module, "embed_scale", 1.0)
    return isinstance(found, Tensor) and torch.allclose(found, module.weight[ids] * scale, rtol=1e-2)


def _watch_embedding(embedding: AdaptableEmbedding, context: StepContext) -> Callable[..., Tensor]:
    base = original_forward(embedding.module)

    def forward(input: Tensor) -> Tensor:  # torch's own name
        return embedding.apply(context.extras, input) if context.extras else base(input)

    return forward


def _watch_norm(norm: AdaptableModule, context: StepContext) -> Callable[..., Tensor]:
    base = original_forward(norm.module)

    def forward(x: Tensor, *gates: Tensor) -> Tensor:
        out = base(x, *gates)
        return norm.apply_norms(context.extras, out, x, *gates) if context.extras else out

    return forward


def _watch_parameters(
    adaptable: AdaptableModule, experts: GroupedExperts | None, context: StepContext
) -> Callable[..., Any]:
    base = original_forward(adaptable.module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if experts is not None and (experts.is_packed or context.has_expert_rows):
            batch = context.lora if context.has_expert_rows else None
            out = experts.forward(*experts.arguments(args, kwargs), batch=batch)
        else:
            out = base(*args, **kwargs)
        return adaptable.apply_parameters(context.extras, out, args, kwargs) if context.extras else out

    return forward
