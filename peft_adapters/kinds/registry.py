"""Finds a kind by PEFT's name. The module of a kind is imported when an adapter of it is first read."""

from __future__ import annotations

import importlib
from typing import Any

from peft_adapters.kinds.kind import Kind

_FAMILIES = {
    "LOHA": "lycoris", "LOKR": "lycoris",
    "DELORA": "blocks", "GRALORA": "blocks", "MISS": "blocks",
    "PVERA": "vectors", "UNILORA": "vectors", "TINYLORA": "vectors", "VBLORA": "vectors", "VERA": "vectors",
    "DEFT": "projections", "HRA": "projections",
    "BEFT": "operations", "BOFT": "operations",
    "IA3": "operations", "OFT": "operations", "ROAD": "operations", "SHIRA": "operations",
    "LN_TUNING": "replacing", "TRAINABLE_TOKENS": "replacing",
}  # fmt: skip
"""The module of each kind, which has it in `KINDS`."""

NAMES = tuple(_FAMILIES)


def kind_of(peft_type: Any) -> Kind | None:
    """Return the kind of a config's `peft_type`; None for LoRA, AdaLoRA and unsupported kinds."""
    family = _FAMILIES.get(peft_type) if isinstance(peft_type, str) else None
    if family is None:
        return None
    return importlib.import_module(f"peft_adapters.kinds.{family}").KINDS[peft_type]
