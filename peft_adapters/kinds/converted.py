"""The record that `lorafleet adapters convert` writes into its result's config: the original kind and the errors.

It is untrusted input that is shown to all users of the adapter. So it counts only if the command could have written it.
The digest covers it: the same weights with another claim are another adapter.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from peft_adapters.json_values import is_object
from peft_adapters.kinds.refused import CONVERTIBLE
from protocol.wire.messages import Converted

CONVERTED_FIELD = "lorafleet_converted"

MAX_LAYERS = 256
"""Maximum layers whose errors are stored, the largest errors first: every gateway holds a copy of the catalogue."""

MAX_ERROR = 1e6
"""Maximum accepted relative error; errors of PEFT's conversion are far below 1."""

MAX_NAME = 160
"""Maximum characters of a layer's name."""


KINDS = CONVERTIBLE | {"LORA", "ADALORA"}
"""Kinds that PEFT can convert to LoRA; LoRA itself too, to a lower rank."""


def read_converted(config: Mapping[str, Any], tensors: Container[str]) -> Converted | None:
    """Return the conversion record in a config; None if there is none, or the command cannot have written it.

    tensors: names in the adapter's file, which must have rank rows for every layer with an error.
    """
    value = config.get(CONVERTED_FIELD)
    if not is_object(value):
        return None
    kind, keep, errors = value.get("peft_type"), value.get("keep"), value.get("errors")
    if not (isinstance(kind, str) and kind in KINDS and _is_share(keep) and is_object(errors)):
        return None
    if not all(_is_layer(layer, tensors) and _is_share(error, most=MAX_ERROR) for layer, error in errors.items()):
        return None
    largest = sorted(errors, key=errors.__getitem__, reverse=True)[:MAX_LAYERS]
    kept = {layer: float(f"{errors[layer]:.3g}") for layer in largest}
    return Converted(kind=kind, keep=float(keep or 0), errors=kept)


def written_converted(config: Mapping[str, Any], tensors: Container[str]) -> dict[str, Any]:
    """Return the config field as `read_converted` reads it, for a blob and its digest; {} if that returns None."""
    found = read_converted(config, tensors)
    if found is None:
        return {}
    return {CONVERTED_FIELD: {"peft_type": found.kind, "keep": found.keep, "errors": found.errors}}


def _is_layer(name: str, tensors: Container[str]) -> bool:
    return 0 < len(name) <= MAX_NAME and name.isprintable() and f"base_model.model.{name}.lora_A.weight" in tensors


def _is_share(value: Any, most: float = 1.0) -> bool:
    return type(value) in (int, float) and 0 <= value <= most
