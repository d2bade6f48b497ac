"""The names of tensors in PEFT's adapter files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from peft_adapters.reasons import Reasons

_PREFIX = "base_model.model."
_WRAPPED = ".base_layer"

_LORA = re.compile(r"(.+)\.lora_(?:(A|B)\.weight|(A|B|E)|B\.(bias))", re.DOTALL)
_EMBEDDING = re.compile(r"(.+)\.lora_embedding_(A|B)", re.DOTALL)
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector", re.DOTALL)
_TOKENS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta", re.DOTALL)
_PLAIN = re.compile(
    r"(.+?)(\.token_adapter\.base_layer|\.base_layer|\.original_module|\.modules_to_save)?\.(weight|bias)", re.DOTALL
)


@dataclass(slots=True)
class Parts:
    """The tensors of a file by the module they belong to; modules as the base model names them.

    A parameter's LoRA is found under its module, with `.base_layer` for each one nested around it.
    """

    lora: dict[str, dict[str, str]] = field(default_factory=dict)  # module -> "A", "B", "E" or "bias" -> tensor
    embedding: dict[str, dict[str, str]] = field(default_factory=dict)  # module -> "A" or "B" -> tensor
    magnitude: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    plain: dict[tuple[str, str, str], str] = field(default_factory=dict)  # (module, what wraps it, parameter) -> tensor

    def has_weight(self, module: str) -> bool:
        """Tell whether the file brings a module's own weight, whatever wraps it."""
        return any(owner == module and parameter == "weight" for owner, _, parameter in self.plain)

    def by_module(self) -> Iterator[tuple[str, str]]:
        """Yield (module, tensor) for every tensor."""
        for groups in (self.lora, self.embedding):
            for module, names in groups.items():
                yield from ((unwrapped(module), name) for name in names.values())
        for flat in (self.magnitude, self.tokens):
            yield from flat.items()
        yield from ((module, name) for (module, _, _), name in self.plain.items())


def sort_tensors(names: Iterable[str], reasons: Reasons) -> Parts:
    """Sort the tensors of a file by what they are; note those that are nothing PEFT writes."""
    parts = Parts()
    for name in names:
        if not name.startswith(_PREFIX) or not _place(name.removeprefix(_PREFIX), name, parts):
            reasons.add("tensors that are not understood", name)
    return parts


def _place(path: str, name: str, parts: Parts) -> bool:
    """Enter one tensor, its name without the prefix; False if it is not understood."""
    if match := _LORA.fullmatch(path):
        half = next(group for group in match.groups()[1:] if group)
        parts.lora.setdefault(match[1], {})[half] = name
    elif match := _EMBEDDING.fullmatch(path):
        parts.embedding.setdefault(match[1], {})[match[2]] = name
    elif match := _MAGNITUDE.fullmatch(path):
        parts.magnitude[match[1]] = name
    elif match := _TOKENS.fullmatch(path):
        parts.tokens[match[1]] = name
    elif (match := _PLAIN.fullmatch(path)) and ".lora_" not in path:
        parts.plain[match[1], match[2] or "", match[3]] = name
    else:
        return False
    return True


def unwrapped(module: str) -> str:
    """Return a module's name without the wrappers of nested parameters."""
    while module.endswith(_WRAPPED):
        module = module.removesuffix(_WRAPPED)
    return module


def nested(module: str, depth: int) -> str:
    """Return the name under which the LoRA of a parameter is found with `depth` others wrapped around it."""
    return module + depth * _WRAPPED
