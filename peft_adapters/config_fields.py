"""Reads single fields of `adapter_config.json`; a field of the wrong type adds a reason for refusal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from peft_adapters.json_values import is_list, is_object
from peft_adapters.reasons import Reasons, show
from peft_adapters.targets import (
    MIN_CONDENSED_TARGETS,
    BadPattern,
    Layers,
    NameTargets,
    PatternMap,
    SavedModules,
    Targets,
)

MAX_ENTRIES = 4_096
"""Maximum entries of `rank_pattern` or `alpha_pattern`."""
MAX_NAMES = 20_000
"""Maximum names in `target_modules` or `exclude_modules`."""
MAX_SAVED = 512
"""Maximum names in `modules_to_save`, each of which is compared with every module of the base model."""
MAX_PARAMETERS = 4_096
MAX_LAYERS_PATTERNS = 64
MAX_TOKEN_MODULES = 64
"""Maximum modules in `trainable_token_indices`."""
MAX_INVOCATION = 1_024
"""Maximum tokens in `alora_invocation_tokens`."""

_MAX_FLOAT32 = 3.4028234663852886e38


def read_flag(config: Mapping[str, Any], key: str, reasons: Reasons) -> bool:
    """Read a field that is true, false or absent."""
    value = config.get(key)
    if value and not isinstance(value, bool):
        reasons.add(f"{key} {show(value)} is not true or false")
    return bool(value)


def is_alpha(value: Any) -> bool:
    """Return whether a value is a number within fp32's range; False for NaN."""
    return type(value) in (int, float) and abs(value) <= _MAX_FLOAT32


def is_rank(value: Any) -> bool:
    """Return whether a value is an integer of 32 bits."""
    return type(value) is int and abs(value) < 1 << 31


def read_pattern_map(name: str, value: Any, valid: Callable[[Any], bool], reasons: Reasons) -> PatternMap | None:
    """Read `rank_pattern` or `alpha_pattern`; return None, with reasons, if it is wrong. valid: checks a number."""
    if not is_object(value) or len(value) > MAX_ENTRIES:
        reasons.add(f"{name} is not a map of at most {MAX_ENTRIES} patterns to numbers")
        return None
    for key, item in value.items():
        if not valid(item):
            reasons.add(f"{name} has values that are not valid numbers", key)
    try:
        return PatternMap(value)
    except BadPattern as error:
        reasons.add(f"{name}: {error}")
        return None


def read_kept_ranks(value: Any, reasons: Reasons) -> dict[str, int]:
    """Read AdaLoRA's `rank_pattern`, which flags the kept singular values of each `MODULE.lora_E`.

    Return their number by module.
    """
    if value is None:
        return {}
    if not is_object(value):
        reasons.add("rank_pattern is not a map of names to lists of true and false")
        return {}
    kept: dict[str, int] = {}
    for name, flags in value.items():
        if not is_list(flags) or not all(isinstance(flag, bool) for flag in flags):
            reasons.add("rank_pattern has values that are not lists of true and false", name)
        else:
            kept[name.rpartition(".")[0]] = sum(flags)
    return kept


def read_targets(value: Mapping[str, Any], parameters: tuple[str, ...], reasons: Reasons) -> Targets | None:
    """Read the fields that choose layers; return None, with reasons, if wrong. parameters: `target_parameters`."""
    targets, excluded, layers = value["target_modules"], value["exclude_modules"], value["layers_to_transform"]
    if parameters and targets is None:
        targets = []
    if not isinstance(targets, str) and not (_are_names(targets) and (targets or parameters)):
        reasons.add(f"target_modules {show(targets)} is neither a pattern nor a list of names")
        return None
    if excluded is not None and not isinstance(excluded, str) and not _are_names(excluded):
        reasons.add(f"exclude_modules {show(excluded)} is neither a pattern nor a list of names")
        return None
    if isinstance(targets, str) and (layers is not None or value["layers_pattern"] is not None):
        reasons.add("layers_to_transform and layers_pattern cannot be used when target_modules is a pattern")
        return None
    try:
        names = NameTargets.read([] if is_all_linear(targets) else targets)
        return Targets(names, NameTargets.read(excluded) if excluded else None, _read_layers(value, reasons))
    except BadPattern as error:
        reasons.add(f"a pattern in target_modules, exclude_modules or layers_pattern {error}")
        return None


def _read_layers(value: Mapping[str, Any], reasons: Reasons) -> Layers | None:
    """Read `layers_to_transform` and `layers_pattern`. Raises BadPattern."""
    indices, pattern = value["layers_to_transform"], value["layers_pattern"]
    if pattern and indices is None:
        reasons.add("layers_pattern needs layers_to_transform")
        return None
    if indices is None or indices == []:
        return None
    indices = [indices] if type(indices) is int else indices
    patterns = [pattern] if isinstance(pattern, str) and pattern else pattern or []
    if (
        not is_list(indices)
        or any(type(index) is not int for index in indices)
        or not _are_names(patterns, MAX_LAYERS_PATTERNS)
    ):
        reasons.add("layers_to_transform or layers_pattern is of the wrong type")
        return None
    if len(value["target_modules"] or []) >= MIN_CONDENSED_TARGETS:
        reasons.add(f"layers_to_transform with {MIN_CONDENSED_TARGETS} or more target_modules is ambiguous in PEFT")
        return None
    return Layers.read(indices, patterns)


def is_all_linear(targets: Any) -> bool:
    """Return whether `target_modules` is the keyword for all linear layers."""
    return isinstance(targets, str) and targets.lower() == "all-linear"


def read_parameters(value: Any, reasons: Reasons) -> tuple[str, ...]:
    """Read `target_parameters`: ends of adapted parameters' names."""
    if not _are_names(value, MAX_PARAMETERS):
        reasons.add(f"target_parameters {show(value)} is not a list of at most {MAX_PARAMETERS} names")
        return ()
    return tuple(value)


def read_saved(value: Any, reasons: Reasons) -> SavedModules | None:
    """Read `modules_to_save`; return None, with reasons, if it is wrong."""
    if not _are_names(value, MAX_SAVED) or not all(value):
        reasons.add(f"modules_to_save {show(value)} is not a list of at most {MAX_SAVED} names")
        return None
    try:
        return SavedModules.read(value)
    except BadPattern as error:
        reasons.add(f"a name in modules_to_save {error}")
        return None


def read_tokens(value: Any, reasons: Reasons) -> dict[str, tuple[int, ...]]:
    """Read `trainable_token_indices`: token ids by ending of a module's name, "" for the input embedding.

    The field is a list for the input embedding, or a map from endings to lists.
    """
    if not value:
        return {}
    by_module = value if is_object(value) else {"": value}
    if len(by_module) > MAX_TOKEN_MODULES:
        reasons.add(f"trainable_token_indices names {len(by_module)} modules; the limit is {MAX_TOKEN_MODULES}")
        return {}
    return {name: read_ids("trainable_token_indices", ids, reasons) for name, ids in by_module.items()}


def read_ids(name: str, value: Any, reasons: Reasons) -> tuple[int, ...]:
    """Read a list of token ids. name: the field's name."""
    if not is_list(value) or not all(type(item) is int and 0 <= item < 1 << 31 for item in value):
        reasons.add(f"{name} {show(value)} is not a list of token ids")
        return ()
    if name == "trainable_token_indices" and len(set(value)) != len(value):
        reasons.add("trainable_token_indices names a token twice")
    if name == "alora_invocation_tokens" and len(value) > MAX_INVOCATION:
        reasons.add(f"{name} holds {len(value)} tokens; the limit is {MAX_INVOCATION}")
    return tuple(value)


def _are_names(value: Any, most: int = MAX_NAMES) -> bool:
    return is_list(value) and len(value) <= most and all(isinstance(item, str) for item in value)
