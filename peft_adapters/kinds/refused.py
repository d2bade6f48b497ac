"""Why kinds of adapters are refused, and the remedies."""

from __future__ import annotations

from typing import Any

_FULL_RANK = "what it adds to a weight has full rank"

CONVERT = "`lorafleet adapters convert SRC DST --base MODEL --rank auto` approximates it by LoRA"
"""Remedy for a kind that PEFT itself can convert to LoRA."""

SETTING = ", as does a store with --convert-adapters"
"""Further remedy for a kind that is not supported at all."""

CONVERTIBLE = frozenset(
    {"C3A", "DELORA", "FOURIERFT", "GRALORA", "LOHA", "LOKR", "MISS", "PSOFT", "RANDLORA", "TINYLORA", "UNILORA",
     "VBLORA", "VERA", "WAVEFT"}
)  # fmt: skip
"""Kinds that PEFT can convert to LoRA."""

REFUSED = {
    "ADAMSS": "its subspaces are found by clustering when it is loaded",
    "ADAPTION_PROMPT": "it changes how attention is computed, in PEFT for Llama and Mistral alone",
    "C3A": _FULL_RANK,
    "FOURIERFT": _FULL_RANK,
    "FROD": _FULL_RANK,
    "GLORA": "it scales the base's weight and bias by matrices",
    "HIRA": _FULL_RANK,
    "SUPERTUNING": "its sparse changes and its LoRA on one layer are not served",
    "LILY": "its router takes the mean over all tokens of a pass: an answer would depend on what runs beside it",
    "OSF": "it replaces the base's weights",
    "PEANUT": _FULL_RANK,
    "POLY": "a task id of each request chooses its parts",
    "PSOFT": "its bases are singular vectors of the base's weights, which its file does not have",
    "RANDLORA": _FULL_RANK,
    "SHADOW": "it is a second model beside the base",
    "WAVEFT": _FULL_RANK,
    "XLORA": "a classifier weighs several adapters in a second pass",
}


def is_converted(kind: Any) -> bool:
    """Return whether a store with `convert_adapters` converts this `peft_type`: refused, but convertible by PEFT."""
    return isinstance(kind, str) and kind in REFUSED and kind in CONVERTIBLE


def why_refused(kind: Any) -> str:
    """Return the text after "is not served" in the refusal of a `peft_type`: the reason, "" for an unknown kind."""
    reason = REFUSED.get(kind) if isinstance(kind, str) else None
    if not reason:
        return ""
    return f": {reason}{what_to_do(kind)}" + (SETTING if is_converted(kind) else "")


def what_to_do(kind: str) -> str:
    """Return the remedy for an adapter of a kind, as the end of a reason; "" if there is none."""
    return f"; {CONVERT}" if kind in CONVERTIBLE else ""
