"""Sorts the tensors of PEFT's adapter files by name: the role of each, and its module."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from peft_adapters.kinds.kind import Kind
from peft_adapters.names.keys import MODEL_PREFIX, PREFIX
from peft_adapters.reasons import Reasons

_WRAPPED = ".base_layer"

_USUAL = (".lora_A.weight", ".lora_B.weight")
_LORA = re.compile(r"(.+)\.lora_(?:(A|B)\.weight|(A|B|E)|B\.(bias))", re.DOTALL)
_EMBEDDING = re.compile(r"(.+)\.lora_embedding_(A|B)", re.DOTALL)
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector", re.DOTALL)
_TOKENS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta", re.DOTALL)
_PLAIN = re.compile(
    r"(.+?)(\.token_adapter\.base_layer|\.base_layer|\.original_module|\.modules_to_save)?\.(weight|bias)", re.DOTALL
)
_NUMBERED = re.compile(r"([\w.]+)\.(?:0|[1-9][0-9]{0,6})", re.ASCII)

Halves = dict[str, str]
"""Tensors of one module's LoRA by "A", "B", "E" (AdaLoRA's values) or "bias"; an embedding's by "A" or "B"."""


@dataclass(slots=True)
class AdapterTensors:
    """The names of a file's tensors, grouped by role and by module; modules have the base model's names.

    The LoRA of a parameter is stored under its module, with `.base_layer` appended for each other parameter's LoRA
    around it.
    """

    lora: dict[str, Halves] = field(default_factory=dict[str, Halves])  # by module
    embedding: dict[str, Halves] = field(default_factory=dict[str, Halves])  # by module
    magnitude: dict[str, str] = field(default_factory=dict[str, str])  # DoRA's, by module
    tokens: dict[str, str] = field(default_factory=dict[str, str])  # trained rows, by module
    of_kind: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])  # of other kinds, by module
    shared: dict[str, str] = field(default_factory=dict[str, str])  # a kind's tensors outside any module
    # (module, its wrapper, parameter) -> tensor
    plain: dict[tuple[str, str, str], str] = field(default_factory=dict[tuple[str, str, str], str])

    def with_weight(self) -> set[str]:
        """Return the modules whose own weight is in the file, whatever their wrapper."""
        return {owner for owner, _, parameter in self.plain if parameter == "weight"}

    def by_module(self) -> Iterator[tuple[str, str]]:
        """Yield (module, tensor) for every tensor; the module is "" for tensors outside any module."""
        for groups in (self.lora, self.embedding):
            for module, names in groups.items():
                owner = unwrapped(module)
                yield from [(owner, name) for name in names.values()]
        for module, names in self.of_kind.items():
            yield from [(module, name) for name in names.values()]
        yield from (("", name) for name in self.shared.values())
        for flat in (self.magnitude, self.tokens):
            yield from flat.items()
        yield from ((module, name) for (module, _, _), name in self.plain.items())


def sort_tensors(names: Mapping[str, str], reasons: Reasons, kind: Kind | None = None) -> AdapterTensors:
    """Sort a file's tensors by name. Adds reasons for names that PEFT does not write.

    names: PEFT's names of the tensors -> the file's names, see `peft_keys`. kind: for an adapter that is not LoRA.
    """
    found = AdapterTensors()
    for name, own in names.items():
        if kind is not None and _sort_kind(name, own, kind, found):
            continue
        if not name.startswith(PREFIX) or not _sort(name.removeprefix(PREFIX), own, found):
            reasons.add("tensors that are not understood", own)
    return found


def _sort_kind(name: str, own: str, kind: Kind, found: AdapterTensors) -> bool:
    """Add a tensor of a kind; return False for any other, such as a whole saved module."""
    for shared in kind.shared:
        if name == f"{MODEL_PREFIX}{shared}":
            found.shared[shared] = own
            return True
    if kind.numbered and (match := _NUMBERED.fullmatch(name)) and match[1] == f"{MODEL_PREFIX}{kind.numbered}":
        found.shared[name.removeprefix(MODEL_PREFIX)] = own
        return True
    path = name.removeprefix(PREFIX)
    end = next((end for end in kind.tensors if path.endswith(f".{end}")), "")
    if end and path != name:
        found.of_kind.setdefault(path.removesuffix(f".{end}"), {})[end] = own
    return bool(end) and path != name


def _sort(path: str, name: str, found: AdapterTensors) -> bool:
    """Add one tensor; return False if its name is not understood. path: the name without the prefix."""
    if path.endswith(_USUAL) and len(path) > len(_USUAL[0]):  # nearly all tensors: a pattern takes several times longer
        half, module = path[-len("A.weight")], path[: -len(_USUAL[0])]
        found.lora.setdefault(module, {})[half] = name
    elif match := _LORA.fullmatch(path):
        half = next(group for group in match.groups()[1:] if group)
        found.lora.setdefault(match[1], {})[half] = name
    elif match := _EMBEDDING.fullmatch(path):
        found.embedding.setdefault(match[1], {})[match[2]] = name
    elif match := _MAGNITUDE.fullmatch(path):
        found.magnitude[match[1]] = name
    elif match := _TOKENS.fullmatch(path):
        found.tokens[match[1]] = name
    elif (match := _PLAIN.fullmatch(path)) and ".lora_" not in path:
        found.plain[match[1], match[2] or "", match[3]] = name
    else:
        return False
    return True


def unwrapped(module: str) -> str:
    """Return a module's name without the suffixes that `nested` appends."""
    while module.endswith(_WRAPPED):
        module = module.removesuffix(_WRAPPED)
    return module


def nested(module: str, depth: int) -> str:
    """Return the name under which a parameter's LoRA is stored. depth: number of other parameters' LoRA around it."""
    return module + depth * _WRAPPED
