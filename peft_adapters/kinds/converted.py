"""What `lorafleet adapters convert` writes into the config of its result: what it approximates, and how far it is off.

It is what a file says of itself, and shown to all who use it. So it counts only as far as the command may have written
it, and the digest covers it: the same weights with another claim are another adapter.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from peft_adapters.json_values import is_object
from peft_adapters.kinds.refused import CONVERTIBLE
from protocol.wire.messages import Converted

CONVERTED_FIELD = "lorafleet_converted"

MAX_LAYERS = 256
"""Layers whose errors are kept, the largest: the catalogue, which every gateway holds a copy of, has them."""

MAX_ERROR = 1e6
"""The largest relative error that is told: any that PEFT's conversion leaves is far below 1."""

MAX_NAME = 160
"""Characters of a layer's name."""


KINDS = CONVERTIBLE | {"LORA", "ADALORA"}
"""What PEFT can write as LoRA; LoRA itself too, with fewer ranks."""


def read_converted(config: Mapping[str, Any], tensors: Container[str]) -> Converted | None:
    """Return what a config says of its conversion; None where it says nothing, or what was never written so.

    tensors: the names in the adapter's file, which has rank rows for every layer whose error is told.
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
    """Return the field of a config as `read_converted` reads it, for a blob and its digest; {} where that is None."""
    found = read_converted(config, tensors)
    if found is None:
        return {}
    return {CONVERTED_FIELD: {"peft_type": found.kind, "keep": found.keep, "errors": found.errors}}


def _is_layer(name: str, tensors: Container[str]) -> bool:
    return 0 < len(name) <= MAX_NAME and name.isprintable() and f"base_model.model.{name}.lora_A.weight" in tensors


def _is_share(value: Any, most: float = 1.0) -> bool:
    return type(value) in (int, float) and 0 <= value <= most
