"""Config, tensors and base model together: what PEFT would make of an adapter. See `peft_format.read_adapter`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal

from peft_adapters import experts as peft_experts
from peft_adapters.config import ADALORA, AdapterConfig
from peft_adapters.experts import OldNames
from peft_adapters.reasons import Reasons
from peft_adapters.safetensors_header import TensorInfo
from peft_adapters.spec import AdapterSpec, LoraWeights, ReplacedWeights, TrainedTokens
from peft_adapters.targets import Names
from peft_adapters.tensors import Parts, nested
from protocol.wire.messages import OPAQUE, ServedModel, SiteShape

LINEAR = ("linear", "conv1d", OPAQUE)

WRAPPED, TOKENS_WRAPPED, ORIGINAL, SAVED_TWICE = (
    ".base_layer", ".token_adapter.base_layer", ".original_module", ".modules_to_save"
)  # fmt: skip
"""What PEFT puts between a module's name and its own parameters when it adapts, trains or saves the module. What is
saved whole it writes a second time, without reading it, when the vocabulary has changed."""


class Reader:
    """Reads one adapter; `read` may be called once."""

    def __init__(
        self,
        config: AdapterConfig,
        parts: Parts,
        tensors: Mapping[str, TensorInfo],
        base: ServedModel | None,
        reasons: Reasons,
    ) -> None:
        self._old = peft_experts.FAMILIES.get(base.model_type) if base else None
        self._config, self._converts = config, False  # experts as they were
        self._parts = parts
        self._tensors = tensors
        self._base = base
        self._reasons = reasons
        self._sites = {site.name: site for site in (base.sites if base else _sites_of_file(parts, tensors))}
        self._embedding = next((s.name for s in self._sites.values() if base and _is_input(s, base)), "")
        self._head = next((s.name for s in self._sites.values() if base and _is_output(s, base)), "")
        self._is_tied = base is not None and base.tied_embeddings and bool(self._embedding and self._head)
        self._vocab_size = 0  # of the replaced embedding or head, if it is not the base's
        self._used: set[str] = set()
        if self._old is not None:
            self._convert(self._old)

    def _convert(self, old: OldNames) -> None:
        """Read names of transformers 4 as PEFT does."""
        converted = peft_experts.convert(self._config, old, self._sites, self._reasons)
        if converted is not None:
            self._config, self._converts = converted, True
            self._parts.lora = peft_experts.rename(self._parts.lora, old)

    def read(self) -> AdapterSpec:
        """Return what the adapter changes; meaningless when there are reasons against it."""
        targeted = self._targeted()
        parameters = self._parameters(targeted)
        if not targeted and not parameters:
            self._reasons.add("target_modules matches no layer of the base model")
        tokens = self._read_tokens(targeted)
        replaced = self._read_replaced(targeted, tokens)
        sites: list[LoraWeights] = []
        embeddings: list[LoraWeights] = []
        for site in targeted.values():
            (embeddings if site.kind == "embedding" else sites).extend(self._read_lora(site))
        wrapped = [lora for module, names in parameters.items() for lora in self._read_parameters(module, names)]
        self._check_unused()
        self._check_vocabulary(replaced, tokens)
        return AdapterSpec(
            sites=(*sites, *(lora for lora in wrapped if self._is_linear(lora))),
            embeddings=tuple(embeddings),
            parameters=tuple(lora for lora in wrapped if not self._is_linear(lora)),
            replaced=tuple(replaced),
            tokens=tuple(tokens),
            invocation=self._config.invocation,
            vocab_size=self._vocab_size,
        )

    # ------------------------------------------------------------ which places

    def _targeted(self) -> dict[str, SiteShape]:
        """Return the layers that the config means."""
        config, targets = self._config, self._config.targets
        if config.all_linear:
            linear = [s.name for s in self._sites.values() if s.kind in LINEAR and s.name != self._head]
            targets = replace(targets, targets=Names(frozenset(linear)))
        found = {
            site.name: site
            for site in self._sites.values()
            if site.kind != "parameter" and targets.chosen(site.name) and not config.saved.excludes(site.name)
        }
        if config.tie and self._is_tied and self._embedding in found:
            found[self._head] = self._sites[self._head]
        for site in found.values():
            self._check_target(site)
        return found

    def _check_target(self, site: SiteShape) -> None:
        if site.kind == "norm":
            self._reasons.add("PEFT cannot adapt modules of this kind", site.name)
        elif site.kind == OPAQUE and self._config.use_dora:
            self._reasons.add("DoRA is not served on quantised layers", site.name)
        elif site.kind == "embedding":
            config = self._config
            kinds = {"lora_bias": config.lora_bias, "alora_invocation_tokens": bool(config.invocation)}
            for name, is_on in kinds.items() | {("AdaLoRA", config.kind == ADALORA)}:
                if is_on:
                    self._reasons.add(f"PEFT does not combine {name} with embeddings", site.name)

    def _parameters(self, targeted: Mapping[str, SiteShape]) -> dict[str, list[str]]:
        """Return the parameters that `target_parameters` means by their module, each module's in the model's order."""
        found: dict[str, list[str]] = {}
        for site in self._sites.values():
            if site.kind == "parameter":
                names = [site.name]
            else:
                names = [f"{site.name}.weight", *([f"{site.name}.bias"] if site.has_bias else [])]
            for name in names:
                if any(name == end or name.endswith(f".{end}") for end in self._config.parameters):
                    if name.endswith(".bias") or (site.kind not in ("parameter", "linear")):
                        self._reasons.add("LoRA on this parameter is not served", name)
                    if site.name in targeted:
                        self._reasons.add("PEFT cannot adapt a layer and its parameter", name)
                    module, _, parameter = name.rpartition(".")
                    found.setdefault(module, []).append(parameter)
        return found

    # ------------------------------------------------------------ LoRA

    def _read_lora(self, site: SiteShape) -> Iterator[LoraWeights]:
        """Yield the LoRA of a targeted layer: none, with reasons, if something is wrong with it."""
        before = len(self._reasons)
        is_embedding = site.kind == "embedding"
        rank = self._config.rank(site.name)
        names = (self._parts.embedding if is_embedding else self._parts.lora).get(site.name, {})
        if rank < (0 if self._config.kind == ADALORA else 1):
            self._reasons.add(f"rank {rank} is not positive", site.name)
            return
        rows, width = self._size(site)
        shapes: dict[str, tuple[int, ...]] = {"A": (rank, rows), "B": (width, rank)}
        if self._config.kind == ADALORA:
            shapes["E"] = (rank, 1)
        if self._config.lora_bias and not is_embedding:
            shapes["bias"] = (width,)
        label = "lora_embedding_" if is_embedding else "lora_"
        taken = {half: self._take(names.get(half), site.name, label + half, shape) for half, shape in shapes.items()}
        magnitude = ""
        if self._config.use_dora:
            name = self._parts.magnitude.get(site.name)
            magnitude = self._take(name, site.name, "lora_magnitude_vector", (width,))
        if len(self._reasons) > before or rank == 0:
            return
        yield LoraWeights(
            site.name, rank, self._config.scale(site.name), taken["A"], taken["B"], bias=taken.get("bias", ""),
            magnitude=magnitude, singular=taken.get("E", ""),
        )  # fmt: skip

    def _size(self, site: SiteShape) -> tuple[int, int]:
        """Return a layer's inputs and outputs, in the adapter's own vocabulary."""
        if self._vocab_size and site.name == self._embedding:
            return self._vocab_size, site.out_features
        if self._vocab_size and site.name == self._head:
            return site.in_features, self._vocab_size
        return site.in_features, site.out_features

    def _read_parameters(self, module: str, parameters: list[str]) -> Iterator[LoraWeights]:
        """Yield the LoRA of a module's parameters; PEFT wraps them one around the other, the first one innermost."""
        for i, parameter in enumerate(parameters):
            before = len(self._reasons)
            name = f"{module}.{parameter}"
            site = self._sites.get(name) or self._sites.get(module)
            if site is None:
                continue
            rank, experts = self._config.rank(name), max(site.num_experts, 1)
            if rank < 1:
                self._reasons.add(f"rank {rank} is not positive", name)
                continue
            if layers := self._layers_of(module, parameter):
                yield from self._read_experts(site, rank, layers)
                continue
            names = self._parts.lora.get(nested(module, len(parameters) - 1 - i), {})
            a = self._take(names.get("A"), name, "lora_A", (rank * experts, site.in_features))
            b = self._take(names.get("B"), name, "lora_B", (site.out_features, rank * experts))
            if len(self._reasons) == before:
                yield LoraWeights(site.name, rank, self._config.scale(name), a, b)

    def _layers_of(self, module: str, parameter: str) -> tuple[str, ...]:
        """Return the old layers of one expert that the file has instead of a parameter; none if it has none."""
        layers = self._old.layers_of(parameter) if self._converts and self._old is not None else ()
        return layers if any(f"{module}.0.{layer}" in self._parts.lora for layer in layers) else ()

    def _read_experts(self, site: SiteShape, rank: int, layers: tuple[str, ...]) -> Iterator[LoraWeights]:
        """Yield the LoRA of experts that were layers: none, with reasons, if something is wrong with it."""
        before, module, share = len(self._reasons), site.name.rpartition(".")[0], len(layers)
        experts: list[tuple[tuple[str, str], ...]] = []
        for expert in range(site.num_experts):
            pairs: list[tuple[str, str]] = []
            for layer in layers:
                name = f"{module}.{expert}.{layer}"
                found = self._parts.lora.get(name, {})
                a = self._take(found.get("A"), name, "lora_A", (rank // share, site.in_features))
                b = self._take(found.get("B"), name, "lora_B", (site.out_features // share, rank // share))
                pairs.append((a, b))
            experts.append(tuple(pairs))
        if len(self._reasons) == before:
            yield LoraWeights(site.name, rank, self._config.scale(site.name), "", "", experts=tuple(experts))

    def _is_linear(self, lora: LoraWeights) -> bool:
        return self._sites[lora.site].kind in LINEAR

    # ------------------------------------------------------------ trained tokens, replaced parameters

    def _read_tokens(self, targeted: Mapping[str, SiteShape]) -> list[TrainedTokens]:
        """Return the rows of embeddings that were trained alone."""
        if self._base is None:
            return []
        chosen: dict[str, tuple[int, ...]] = {}
        for ending, indices in self._config.tokens.items():
            modules = [s.name for s in self._sites.values() if s.name.endswith(ending)] if ending else [self._embedding]
            if not any(modules):
                self._reasons.add("trainable_token_indices names no module of the base model", ending or None)
            chosen |= {module: indices for module in modules if module}
        indices = chosen.get(self._embedding)
        tied_to = self._embedding if indices and self._is_tied and chosen.get(self._head, indices) == indices else ""
        if tied_to and indices:
            chosen[self._head] = indices
        found: list[TrainedTokens] = []
        for module, indices in chosen.items():
            is_tied = tied_to and module == self._head  # PEFT trains the layer inside its LoRA then
            if (module in targeted and not (is_tied and not self._config.use_dora)) or self._config.saved.saves(module):
                self._reasons.add("trained tokens of a module that is also adapted or saved whole", module)
            found.extend(self._read_trained(module, indices, tied_to if module == self._head else ""))
        return found

    def _read_trained(self, module: str, indices: tuple[int, ...], tied_to: str) -> Iterator[TrainedTokens]:
        site = self._sites[module]
        if site.kind == "embedding":
            width = site.out_features
        elif site.kind == "linear" and not site.has_bias:
            width = site.in_features
        else:
            self._reasons.add("trained tokens of this module are not served", module)
            return
        if tied_to and module in self._parts.tokens:
            self._used.add(self._parts.tokens[module])  # a copy, which PEFT does not read
        name = self._parts.tokens.get(tied_to or module)
        tensor = self._take(name, module, "trainable_tokens_delta", (len(indices), width))
        if tensor:
            yield TrainedTokens(module, indices, tensor)

    def _read_replaced(self, targeted: Mapping[str, SiteShape], tokens: list[TrainedTokens]) -> list[ReplacedWeights]:
        """Return the parameters that the file brings whole: `modules_to_save`, biases, saved base weights."""
        wrapped = {part.site: TOKENS_WRAPPED for part in tokens} | dict.fromkeys(targeted, WRAPPED)
        found: dict[tuple[str, str], ReplacedWeights] = {}
        loaded: dict[str, ReplacedWeights] = {}  # weights that PEFT loads into the base's own modules
        for site in self._sites.values():
            is_saved = self._config.saved.saves(site.name)
            if site.kind == OPAQUE and (is_saved or self._parts.has_weight(site.name)):
                self._reasons.add("whole weights of quantised layers are not served", site.name)
                continue
            for parameter in _parameters_of(site):
                own = self._replacement(site, wrapped.get(site.name, ""), parameter)
                if own is not None:
                    found[site.name, parameter] = own
                elif is_saved and self._base is not None:
                    self._reasons.add("tensors missing for modules_to_save", f"{site.name}.{parameter}")
                original = self._replacement(site, ORIGINAL, parameter) if is_saved else own
                if original is not None and parameter == "weight":
                    loaded[site.name] = original
                if is_saved:
                    self._replacement(site, SAVED_TWICE, parameter)
        if self._is_tied:
            self._tie(found, loaded)
        return list(found.values())

    def _replacement(
        self, site: SiteShape, wrapper: str, parameter: Literal["weight", "bias"]
    ) -> ReplacedWeights | None:
        """Return the parameter of a module that the file holds under a wrapper's name, if it does."""
        name = self._parts.plain.get((site.name, wrapper, parameter))
        if name is None or not self._take(name, site.name, parameter, self._shape(site, parameter, name)):
            return None
        return ReplacedWeights(site.name, parameter, name)

    def _tie(self, found: dict[tuple[str, str], ReplacedWeights], loaded: Mapping[str, ReplacedWeights]) -> None:
        """Share what is loaded into the weight of embedding and head; a module that is saved whole has its own."""
        pair = (self._embedding, self._head)
        last = loaded.get(self._head) or loaded.get(self._embedding)  # PEFT loads the head's last
        if last is not None:
            for name in pair:
                if not self._config.saved.saves(name):
                    found[name, "weight"] = replace(last, site=name)

    def _shape(self, site: SiteShape, parameter: str, name: str) -> tuple[int, ...]:
        """Return the shape that a replaced parameter must have; of embedding and head the file says how many tokens."""
        if parameter == "bias" or site.kind == "norm":
            num = self._size(site)[1] if parameter == "bias" and site.kind != "norm" else site.in_features
            return (num,)
        rows, width = site.in_features, site.out_features
        found = self._tensors[name].shape
        if site.name in (self._embedding, self._head) and self._base is not None:
            own = found[0]
            if self._vocab_size and own != self._vocab_size:
                self._reasons.add(f"embedding and head of {self._vocab_size} and {own} tokens do not fit together")
            if own != self._base.vocab_size:
                self._vocab_size = own
            rows, width = (own, width) if site.kind == "embedding" else (rows, own)
        return (width, rows) if site.kind == "linear" else (rows, width)

    def _check_vocabulary(self, replaced: list[ReplacedWeights], tokens: list[TrainedTokens]) -> None:
        """Refuse token ids whose rows are neither in the base model nor in the file; settle the vocabulary."""
        if self._base is None:
            return
        whole = {part.site for part in replaced if part.parameter == "weight"}
        sizes: dict[str, int] = {}
        for module in filter(None, (self._embedding, self._head)):
            size = self._vocab_size if self._vocab_size and module in whole else self._base.vocab_size
            new = sorted(i for part in tokens if part.site == module for i in part.indices if i >= size)
            if new != list(range(size, size + len(new))):
                self._reasons.add(f"token {new[-1]} is trained, but the rows before it are not in the file", module)
            sizes[module] = size + len(new)
        if len(set(sizes.values())) > 1:
            shown = " and ".join(map(str, sizes.values()))
            self._reasons.add(f"embedding and head would have {shown} tokens: save both, or train rows of both")
        elif sizes and self._embedding in sizes and sizes[self._embedding] != self._base.vocab_size:
            self._vocab_size = sizes[self._embedding]
        known = self._vocab_size or self._base.vocab_size
        if any(token >= known for token in self._config.invocation):
            self._reasons.add(f"alora_invocation_tokens holds ids outside 0 … {known - 1}")

    # ------------------------------------------------------------ tensors

    def _take(self, name: str | None, module: str, what: str, shape: tuple[int, ...]) -> str:
        """Return a tensor's name and note that it is used; "" with a reason when it is missing or of another shape."""
        if name is None:
            self._reasons.add("tensors missing for targeted layers", f"{module}.{what}")
            return ""
        self._used.add(name)
        found = self._tensors[name].shape
        if found != shape:
            self._reasons.add(f"{what} has shape {list(found)} where config and base model want {list(shape)}", module)
            return ""
        return name

    def _check_unused(self) -> None:
        """Note the tensors that nothing uses."""
        if self._base is None:
            return
        known = {site.name for site in self._sites.values()} | {
            site.name.rpartition(".")[0] for site in self._sites.values() if site.kind == "parameter"
        }
        for module, name in sorted(self._parts.by_module()):
            if name in self._used:
                continue
            if module in known:
                self._reasons.add("tensors for layers that the config does not target", name)
            else:
                self._reasons.add("tensors for layers that the base model does not have or cannot adapt", name)


def _parameters_of(site: SiteShape) -> tuple[Literal["weight", "bias"], ...]:
    """Return the parameters of a module that an adapter may bring whole."""
    if site.kind == "parameter":
        return ()
    return ("weight", "bias") if site.has_bias else ("weight",)


def _is_input(site: SiteShape, base: ServedModel) -> bool:
    return site.kind == "embedding" and site.in_features == base.vocab_size


def _is_output(site: SiteShape, base: ServedModel) -> bool:
    """Tell whether a layer is the language model's head, which PEFT leaves out of "all-linear"."""
    is_linear, in_layer = site.kind in LINEAR, any(part.isdigit() for part in site.name.split("."))
    return is_linear and site.out_features == base.vocab_size and not in_layer


def _sites_of_file(parts: Parts, tensors: Mapping[str, TensorInfo]) -> list[SiteShape]:
    """Return the layers as the file describes them, for want of a base model."""

    def size(pair: Mapping[str, str], half: str, axis: int) -> int:
        return tensors[pair[half]].shape[axis] if half in pair else 0

    sites = [SiteShape(module, size(pair, "A", -1), size(pair, "B", 0)) for module, pair in parts.lora.items()]
    sites += [
        SiteShape(module, size(pair, "A", -1), size(pair, "B", 0), "embedding")
        for module, pair in parts.embedding.items()
    ]
    return sorted(sites, key=lambda site: site.name)
