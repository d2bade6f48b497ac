"""Matches the tensors in an adapter's file with the modules of the base model."""

from __future__ import annotations

from collections.abc import Mapping

from peft_adapters.config import AdapterConfig
from peft_adapters.experts import OldNames
from peft_adapters.reasons import Reasons
from peft_adapters.safetensors_header import FLOATS, TensorInfo
from peft_adapters.tensors import AdapterTensors
from protocol.wire.messages import OPAQUE, ServedModel, SiteShape

LINEAR = ("linear", "conv1d", OPAQUE)
"""Kinds of sites that are linear layers."""


class TensorMatcher:
    """The state of reading one adapter: its config and tensors, the base model, and the tensors used so far."""

    def __init__(
        self,
        config: AdapterConfig,
        tensors: AdapterTensors,
        infos: Mapping[str, TensorInfo],
        base: ServedModel | None,
        reasons: Reasons,
    ) -> None:
        """infos: tensor shapes by name. base: None to check without a model. reasons: collects reasons for refusal."""
        self.config = config
        self.tensors = tensors
        self.infos = infos
        self.base = base
        self.reasons = reasons
        sites = base.sites if base else _sites_of_file(tensors, infos)
        self.sites = {site.name: site for site in sites}
        self.embedding = next((site.name for site in sites if base and _is_input(site, base)), "")
        self.head = next((site.name for site in sites if base and _is_output(site, base)), "")
        self.is_tied = base is not None and base.tied_embeddings and bool(self.embedding and self.head)
        self.old_names: OldNames | None = None  # former names of experts, if the file follows transformers 4
        self.vocab_size = 0  # rows of the replaced embedding or head; 0: the base's vocabulary
        self.label_head = base.label_head if base else ""
        self.num_labels = 0  # labels of the adapter's own head; 0: the base's head
        self._used: set[str] = set()

    def size(self, site: SiteShape) -> tuple[int, int]:
        """Return a layer's inputs and outputs, with the adapter's own vocabulary and labels."""
        if self.vocab_size and site.name == self.embedding:
            return self.vocab_size, site.out_features
        if self.vocab_size and site.name == self.head:
            return site.in_features, self.vocab_size
        if self.num_labels and site.name == self.label_head:
            return site.in_features, self.num_labels
        return site.in_features, site.out_features

    def take(self, name: str | None, module: str, what: str, shape: tuple[int, ...], *, integers: bool = False) -> str:
        """Mark a tensor as used and return its name; "", with a reason, if it is missing or has another shape.

        what: the tensor's part of the module, for the reason. integers: whether it must hold integers.
        """
        if name is None:
            self.reasons.add("tensors missing for targeted layers", f"{module}.{what}")
            return ""
        self._used.add(name)
        found = self.infos[name].shape
        if found != shape:
            self.reasons.add(f"{what} has shape {list(found)} where config and base model want {list(shape)}", module)
            return ""
        if (self.infos[name].dtype not in FLOATS) != integers:
            self.reasons.add(f"{what} has dtype {self.infos[name].dtype}", module)
            return ""
        return name

    def ignore(self, name: str) -> None:
        """Mark a tensor as used that PEFT does not read."""
        self._used.add(name)

    def check_unused(self) -> None:
        """Add a reason for every unused tensor. Does nothing without a base model."""
        if self.base is None:
            return
        known = set(self.sites) | {name.rpartition(".")[0] for name, s in self.sites.items() if s.kind == "parameter"}
        for module, name in sorted(pair for pair in self.tensors.by_module() if pair[1] not in self._used):
            if module in known:
                self.reasons.add("tensors for layers that the config does not target", name)
            else:
                self.reasons.add("tensors for layers that the base model does not have or cannot adapt", name)


def _is_input(site: SiteShape, base: ServedModel) -> bool:
    return site.kind == "embedding" and site.in_features == base.vocab_size


def _is_output(site: SiteShape, base: ServedModel) -> bool:
    """Return whether a layer is the language model's head, which PEFT excludes from "all-linear"."""
    if site.kind not in LINEAR or site.out_features != base.vocab_size:
        return False
    return not any(part.isdigit() for part in site.name.split("."))  # it is outside all layers


def _sites_of_file(tensors: AdapterTensors, infos: Mapping[str, TensorInfo]) -> list[SiteShape]:
    """Return the layers described by the file's own LoRA, for use without a base model."""

    def size(pair: Mapping[str, str], half: str, axis: int) -> int:
        return infos[pair[half]].shape[axis] if half in pair else 0

    sites = [SiteShape(module, size(pair, "A", -1), size(pair, "B", 0)) for module, pair in tensors.lora.items()]
    sites += [
        SiteShape(module, size(pair, "A", -1), size(pair, "B", 0), "embedding")
        for module, pair in tensors.embedding.items()
    ]
    return sorted(sites, key=lambda site: site.name)
