"""The parts of a model besides linear layers that adapters may change: embeddings, norms, parameters of other modules.

Found by watching the trial run, as all else: a part is one only if it is computed token by token, once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gpu_worker.adapters.extras import EmbeddingPlace, ModulePlace, TokenLayout, original_forward
from gpu_worker.model.attention import StepContext
from gpu_worker.model.lora import SharedInput, SiteInfo, is_number
from protocol.wire.messages import SiteShape


@dataclass(slots=True)
class Places:
    """The changeable parts of one model by name, linear layers included."""

    context: StepContext
    linear: dict[str, tuple[SharedInput, int]] = field(default_factory=dict)  # and which of its siblings
    embeddings: dict[str, EmbeddingPlace] = field(default_factory=dict)
    norms: dict[str, ModulePlace] = field(default_factory=dict)
    modules: dict[str, ModulePlace] = field(default_factory=dict)  # with parameters LoRA can be put on

    def norm_of(self, module: nn.Module) -> ModulePlace | None:
        return next((place for place in self.norms.values() if place.module is module), None)

    def parameter(self, name: str, parameter: str) -> Tensor | None:
        """Return a parameter of the base model, the weight of a linear layer always as [N, K]."""
        if name in self.linear:
            shared, index = self.linear[name]
            return shared.weight(index) if parameter == "weight" else shared.bias(index)
        place = self.embeddings.get(name) or self.norms.get(name) or self.modules[name]
        return place.module.get_parameter(parameter).detach()

    def shapes(self, sites: list[SiteInfo]) -> list[SiteShape]:
        """Return what the fleet must know of every part to read adapters for it."""
        shapes = [SiteShape(s.name, s.in_features, s.out_features, s.kind, s.has_bias) for s in sites]
        for name, place in self.embeddings.items():
            shapes.append(SiteShape(name, place.module.num_embeddings, place.module.embedding_dim, "embedding"))
        for name, place in self.norms.items():
            width = len(place.module.get_parameter("weight"))
            has_bias = place.module._parameters.get("bias") is not None
            shapes.append(SiteShape(name, width, width, "norm", has_bias))
        for name, place in self.modules.items():
            shapes += [_parameter_shape(name, place.module, parameter) for parameter in adaptable(place.module)]
        return shapes

    def watch(self) -> None:
        """Let every part but the linear layers and the norms that run by shortcut look for extras in each step."""
        for embedding in self.embeddings.values():
            embedding.module.forward = _watch_embedding(embedding, self.context)
        for norm in self.norms.values():
            if "forward" not in norm.module.__dict__:
                norm.module.forward = _watch_norm(norm, self.context)
        for module in self.modules.values():
            module.module.forward = _watch_parameters(module, self.context)


def find_places(
    model: nn.Module,
    per_token: Mapping[str, TokenLayout],
    sites: list[SiteInfo],
    shared: list[SharedInput],
    context: StepContext,
) -> Places:
    """Find the parts of a model. per_token: modules that the trial saw called once, token by token."""
    places = Places(context)
    owners = [(inputs, i) for inputs in shared for i in range(inputs.num_siblings)]
    places.linear = {site.name: owner for site, owner in zip(sites, owners, strict=True)}
    for name, module in model.named_modules():
        if name not in per_token or name in places.linear:
            continue
        if isinstance(module, nn.Embedding):
            if _is_plain_lookup(module):
                places.embeddings[name] = EmbeddingPlace(name, module)
        elif _is_norm(module):
            places.norms[name] = ModulePlace(name, module, per_token[name])
        elif adaptable(module):
            places.modules[name] = ModulePlace(name, module, per_token[name])
    return places


def adaptable(module: nn.Module) -> list[str]:
    """Return the module's own parameters that PEFT's `target_parameters` can adapt and we can, in its order."""
    if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
        return []
    return [
        name
        for name, parameter in module.named_parameters(recurse=False)
        if is_number(parameter) and (parameter.ndim == 2 or (parameter.ndim == 3 and len(parameter) > 1))
    ]


def _parameter_shape(name: str, module: nn.Module, parameter: str) -> SiteShape:
    weight = module.get_parameter(parameter)
    num_experts = len(weight) if weight.ndim == 3 else 0
    first, second = weight.shape[-2:]
    if weight.ndim == 3 and getattr(module, "is_transposed", False):
        return SiteShape(f"{name}.{parameter}", first, second, "parameter", num_experts=num_experts)
    return SiteShape(f"{name}.{parameter}", second, first, "parameter", num_experts=num_experts)


def _is_norm(module: nn.Module) -> bool:
    """Tell whether a module has a weight vector, perhaps a bias, and nothing else."""
    parameters = dict(module.named_parameters(recurse=False))
    vectors = all(parameter.ndim == 1 for parameter in parameters.values())
    names = set(parameters)
    return vectors and "weight" in names and names <= {"weight", "bias"} and next(module.children(), None) is None


def _is_plain_lookup(module: nn.Embedding) -> bool:
    """Tell whether an embedding returns its rows, perhaps scaled, and nothing else."""
    if not is_number(module.weight):
        return False
    ids = torch.arange(min(3, module.num_embeddings), device=module.weight.device)[None]
    try:
        found = original_forward(module)(ids)
    except Exception:  # noqa: BLE001 - it may want any arguments
        return False
    scale = getattr(module, "embed_scale", 1.0)
    return isinstance(found, Tensor) and torch.allclose(found, module.weight[ids] * scale, rtol=1e-2)


def _watch_embedding(place: EmbeddingPlace, context: StepContext) -> Callable[..., Tensor]:
    base = original_forward(place.module)

    def forward(input: Tensor) -> Tensor:  # named as torch names it
        return place.apply(context.extras, input) if context.extras else base(input)

    return forward


def _watch_norm(place: ModulePlace, context: StepContext) -> Callable[..., Tensor]:
    base = original_forward(place.module)

    def forward(x: Tensor) -> Tensor:
        out = base(x)
        return place.apply_norms(context.extras, out, x) if context.extras else out

    return forward


def _watch_parameters(place: ModulePlace, context: StepContext) -> Callable[..., Any]:
    base = original_forward(place.module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = base(*args, **kwargs)
        return place.apply_parameters(context.extras, out, args, kwargs) if context.extras else out

    return forward
