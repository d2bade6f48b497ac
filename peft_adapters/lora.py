"""Reads an adapter's LoRA on layers, on single parameters, and on experts as transformers 4 named them."""

from __future__ import annotations

from collections.abc import Iterator

from peft_adapters.config import ADALORA
from peft_adapters.matching import TensorMatcher
from peft_adapters.spec import LoraWeights
from peft_adapters.tensors import nested
from protocol.wire.messages import SiteShape


def read_lora(matcher: TensorMatcher, site: SiteShape) -> Iterator[LoraWeights]:
    """Yield the LoRA of a targeted layer; nothing, with reasons, if it is invalid."""
    config, reasons = matcher.config, matcher.reasons
    before = len(reasons)
    is_embedding = site.kind == "embedding"
    rank = config.rank(site.name)
    names = (matcher.tensors.embedding if is_embedding else matcher.tensors.lora).get(site.name, {})
    if rank < (0 if config.kind == ADALORA else 1):
        reasons.add(f"rank {rank} is not positive", site.name)
        return
    rows, width = matcher.size(site)
    shapes: dict[str, tuple[int, ...]] = {"A": (rank, rows), "B": (width, rank)}
    if config.kind == ADALORA:
        shapes["E"] = (rank, 1)
    if config.lora_bias and not is_embedding:
        shapes["bias"] = (width,)
    label = "lora_embedding_" if is_embedding else "lora_"
    taken = {half: matcher.take(names.get(half), site.name, label + half, shape) for half, shape in shapes.items()}
    magnitude = ""
    if config.use_dora:
        name = matcher.tensors.magnitude.get(site.name)
        magnitude = matcher.take(name, site.name, "lora_magnitude_vector", (width,))
    if len(reasons) > before or rank == 0:
        return
    yield LoraWeights(
        site.name, rank, config.scale(site.name), taken["A"], taken["B"], bias=taken.get("bias", ""),
        magnitude=magnitude, singular=taken.get("E", ""),
    )  # fmt: skip


def read_parameters(matcher: TensorMatcher, module: str, parameters: list[str]) -> Iterator[LoraWeights]:
    """Yield the LoRA of a module's parameters, in order.

    PEFT nests the LoRA of several parameters, the first one's innermost.
    """
    config, reasons = matcher.config, matcher.reasons
    for i, parameter in enumerate(parameters):
        before = len(reasons)
        name = f"{module}.{parameter}"
        site = matcher.sites.get(name) or matcher.sites.get(module)
        if site is None:
            continue
        rank, experts = config.rank(name), max(site.num_experts, 1)
        if rank < 1:
            reasons.add(f"rank {rank} is not positive", name)
            continue
        if layers := _old_layers(matcher, module, parameter):
            yield from _read_experts(matcher, site, rank, layers)
            continue
        names = matcher.tensors.lora.get(nested(module, len(parameters) - 1 - i), {})
        a = matcher.take(names.get("A"), name, "lora_A", (rank * experts, site.in_features))
        b = matcher.take(names.get("B"), name, "lora_B", (site.out_features, rank * experts))
        if len(reasons) == before:
            yield LoraWeights(site.name, rank, config.scale(name), a, b)


def _old_layers(matcher: TensorMatcher, module: str, parameter: str) -> tuple[str, ...]:
    """Return the layers of one expert that the file has instead of a parameter; empty if it has the parameter."""
    layers = matcher.old_names.layers_of(parameter) if matcher.old_names is not None else ()
    return layers if any(f"{module}.0.{layer}" in matcher.tensors.lora for layer in layers) else ()


def _read_experts(matcher: TensorMatcher, site: SiteShape, rank: int, layers: tuple[str, ...]) -> Iterator[LoraWeights]:
    """Yield the LoRA of experts that the file has as layers; nothing, with reasons, if it is invalid."""
    before, module, share = len(matcher.reasons), site.name.rpartition(".")[0], len(layers)
    experts: list[tuple[tuple[str, str], ...]] = []
    for expert in range(site.num_experts):
        pairs: list[tuple[str, str]] = []
        for layer in layers:
            name = f"{module}.{expert}.{layer}"
            found = matcher.tensors.lora.get(name, {})
            a = matcher.take(found.get("A"), name, "lora_A", (rank // share, site.in_features))
            b = matcher.take(found.get("B"), name, "lora_B", (site.out_features // share, rank // share))
            pairs.append((a, b))
        experts.append(tuple(pairs))
    if len(matcher.reasons) == before:
        yield LoraWeights(site.name, rank, matcher.config.scale(site.name), "", "", experts=tuple(experts))
