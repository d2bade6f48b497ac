"""Reads PEFT's LoRA and AdaLoRA adapters: which tensor of the file changes which part of the base model, and how.

The public interface of this package. Pure: no torch, no files. The store checks adapters with it, and the worker loads
them. An adapter is read exactly as PEFT 0.21 would apply it, or refused with all reasons at once.

To follow an adapter through the package: `config` reads its fields with `targets`, `tensors` sorts its tensors by name,
`names` finds the base model's names for them, `reader` matches both with the base model, and `spec` is the result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from peft_adapters.config import (
    ADALORA,
    ALWAYS_WITHOUT_EFFECT,
    CONFIG_FILE,
    LORA,
    MAX_CONFIG_BYTES,
    canonical_config,
    parse_config,
    read_config,
    whole_modules,
)
from peft_adapters.kinds.converted import written_converted
from peft_adapters.kinds.refused import why_refused
from peft_adapters.kinds.registry import kind_of
from peft_adapters.kinds.virtual import CLASSIFIES, SAVED_PREFIX, is_virtual, read_virtual, virtual_tensors
from peft_adapters.names.keys import PREFIX, peft_keys
from peft_adapters.names.translation import translate
from peft_adapters.reader import read_spec, read_whole_modules
from peft_adapters.reasons import Reasons, show
from peft_adapters.safetensors_header import MAX_HEADER_BYTES, TensorInfo, parse_header
from peft_adapters.spec import AdapterSpec, LoraWeights, ReplacedWeights, TrainedTokens
from peft_adapters.tensors import AdapterTensors, sort_tensors
from protocol.wire.errors import AdapterRefused
from protocol.wire.messages import ServedModel

__all__ = [
    "CONFIG_FILE", "FOLDER_HEADER", "MAX_CONFIG_BYTES", "MAX_HEADER_BYTES", "WEIGHTS_FILE", "AdapterSpec",
    "LoraWeights", "ReplacedWeights", "TensorInfo", "TrainedTokens", "adapter_digest", "canonical_config",
    "parse_config", "parse_header", "read_adapter",
]  # fmt: skip

WEIGHTS_FILE = "adapter_model.safetensors"

FOLDER_HEADER = "X-Lorafleet-Folder"
"""The HTTP header that names an adapter's folder on the store's machine, percent-encoded."""


def adapter_digest(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], weights: Any) -> str:
    """Return the adapter's identity: SHA-256 (hex) of canonical config and every tensor's name, dtype, shape, bytes.

    Conversion records in the config count too, see `peft_adapters.kinds.converted`: they are shown with the adapter.
    tensors: from `parse_header`. weights: the whole safetensors file as a buffer (bytes, memoryview, mmap). The offsets
    of tensors and the file's metadata do not matter. Large tensors are hashed without holding the GIL.
    """
    counts = canonical_config(config) | written_converted(config, tensors)
    total = hashlib.sha256(json.dumps(counts, separators=(",", ":")).encode())
    with memoryview(weights) as view:
        for name, tensor in sorted(tensors.items()):
            with view[tensor.begin : tensor.end] as part:
                content = hashlib.sha256(part).hexdigest()
            total.update(f'{_entry_of(name, tensor.dtype, tensor.shape)}{content}"]'.encode())
    return total.hexdigest()


@lru_cache(4096)  # adapters trained alike have the same names and shapes; at most 16 MB, since names are bounded
def _entry_of(name: str, dtype: str, shape: tuple[int, ...]) -> str:
    """Return a tensor's part of the digest, as JSON, up to the hash of its bytes."""
    return json.dumps([name, dtype, shape, ""]).removesuffix('"]')


def read_adapter(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], base: ServedModel | None) -> AdapterSpec:
    """Read an adapter as PEFT would apply it to a base model; without one, check what can be checked.

    `AdapterSpec.mapped` describes names of tensors or modules that differ from PEFT's and the base model's. config: its
    parsed `adapter_config.json`. tensors: from `parse_header`. Every tensor must be used, and every targeted layer must
    have its tensors. Raises AdapterRefused with all reasons.
    """
    kind = config.get("peft_type")
    own = kind_of(kind)
    if is_virtual(kind):
        reasons = Reasons()
        spec = _read_virtual(config, tensors, base, reasons)
        if reasons:
            raise AdapterRefused(reasons.render())
        return spec
    if own is None and kind not in (LORA, ADALORA):
        raise AdapterRefused([f"peft_type {show(kind)} is not served{why_refused(kind)}"])
    reasons = Reasons()
    fields = read_config(config, reasons)
    keys = peft_keys(tensors)
    sorted_tensors = sort_tensors(keys.files, reasons, own)
    if fields is None:
        raise AdapterRefused(reasons.render())
    other = None if base is None else translate(_outputs(sorted_tensors, tensors), _modules(sorted_tensors), base)
    spec = read_spec(fields, sorted_tensors, tensors, other.base if other is not None else base, reasons)
    if other is not None and base is not None and not reasons:
        spec = other.back(spec, base.sites, reasons)
    if reasons:
        raise AdapterRefused(reasons.render())
    rules = {**keys.rules, **(other.rules if other is not None else {})}
    return replace(spec, mapped=rules) if rules else spec


def _read_virtual(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], base: ServedModel | None, reasons: Reasons
) -> AdapterSpec:
    """Return virtual tokens, and a classifier's head; meaningless if reasons were added."""
    classifies = config.get("task_type") == CLASSIFIES
    own, saved = virtual_tensors(tensors) if classifies else (tensors, {})
    spec = read_virtual(config, own, base, reasons, ALWAYS_WITHOUT_EFFECT)
    fields = whole_modules(config.get("modules_to_save") or [], reasons)
    if not classifies or reasons or fields is None:
        return spec
    names = {PREFIX + name.removeprefix(SAVED_PREFIX): name for name in saved}  # PEFT's names in other kinds
    whole = read_whole_modules(fields, sort_tensors(names, reasons), saved, base, reasons)
    return replace(whole, virtual=spec.virtual, unscaled=spec.unscaled)


def _modules(tensors: AdapterTensors) -> set[str]:
    """Return the modules of which a file has tensors."""
    return {module for module, _ in tensors.by_module() if module}


def _outputs(tensors: AdapterTensors, infos: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Return the modules with LoRA in a file, with the number of rows of B; 0 without a B."""
    return {module: infos[pair["B"]].shape[0] if "B" in pair else 0 for module, pair in tensors.lora.items()}
