"""What `lorafleet adapters convert` writes into the config of its result: what it approximates, and how far it is off.

It is what a file says of itself. It changes no answer, so that the digest does not cover it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_adapters.json_values import is_object
from protocol.wire.messages import Converted

CONVERTED_FIELD = "lorafleet_converted"

MAX_LAYERS = 256
"""Layers whose errors are kept, the largest: the catalogue, which every gateway holds a copy of, has them."""

MAX_ERROR = 1e6
"""The largest relative error that is told: any that PEFT's conversion leaves is far below 1."""

MAX_NAME = 160
"""Characters of a layer's or a kind's name."""


def read_converted(config: Mapping[str, Any]) -> Converted | None:
    """Return what a config says of its conversion; None where it says nothing, or nothing of that form."""
    value = config.get(CONVERTED_FIELD)
    if not is_object(value):
        return None
    kind, keep, errors = value.get("peft_type"), value.get("keep"), value.get("errors")
    if not (_is_name(kind) and _is_share(keep) and is_object(errors)):
        return None
    if not all(_is_name(layer) and _is_share(error, most=MAX_ERROR) for layer, error in errors.items()):
        return None
    largest = sorted(errors, key=errors.__getitem__, reverse=True)[:MAX_LAYERS]
    kept = {layer: float(f"{errors[layer]:.3g}") for layer in largest}
    return Converted(kind=str(kind), keep=float(keep or 0), errors=kept)


def written_converted(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the field of a config as `read_converted` understands it, for the config of a blob; {} without one."""
    found = read_converted(config)
    if found is None:
        return {}
    return {CONVERTED_FIELD: {"peft_type": found.kind, "keep": found.keep, "errors": found.errors}}


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME and value.isprintable()


def _is_share(value: Any, most: float = 1.0) -> bool:
    return type(value) in (int, float) and 0 <= value <= most
