"""Reads `adapter_config.json` of PEFT's LoRA and AdaLoRA: every field is served, refused by name, or without effect."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peft_adapters.reasons import Reasons, load_json_object, show
from peft_adapters.targets import MIN_CONDENSED_TARGETS, BadPattern, Layers, Names, PatternMap, SavedModules, Targets
from peft_adapters.texts import TEXTS_FIELD
from protocol.wire.errors import AdapterRefused

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_PATTERNS = 4_096
MAX_NAMES = 20_000

LORA, ADALORA = "LORA", "ADALORA"

_MAX_FLOAT32 = 3.4028234663852886e38

_DEFAULTS: dict[str, Any] = {
    "peft_type": None, "r": 8, "lora_alpha": 8, "use_rslora": False, "target_modules": None, "exclude_modules": None,
    "layers_to_transform": None, "layers_pattern": None, "rank_pattern": {}, "alpha_pattern": {},
}  # fmt: skip
"""The fields of plain LoRA that change the maths, with PEFT's defaults."""

_SERVED = (
    "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters",
    "alora_invocation_tokens", "ensure_weight_tying", "init_r",
)  # fmt: skip
"""Further fields that change the maths; absent, null, false and empty they change nothing."""

_UNSERVED = {
    "layer_replication": "replicated layers", "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow routing", "kasa_config": "KaSA", "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA", "megatron_config": "Megatron layers",
}  # fmt: skip
"""Features refused by name when they are switched on."""

_OBJECTS = {"use_bdlora", *(key for key in _UNSERVED if key.endswith("_config"))}
"""Those that are an object: PEFT takes {} as on, and stumbles over false."""

_NO_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "fan_in_fan_out", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "runtime_config", "bias", "init_lora_weights", TEXTS_FIELD,
}  # fmt: skip
"""Fields without effect on the weights. `bias` and `init_lora_weights` have their own check: biases are told by their
tensors. Of `fan_in_fan_out` PEFT takes the layer's own value; the `*_config` ones configure an `init_lora_weights`."""

_ADALORA_TRAINING = {
    "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"
}  # fmt: skip
"""AdaLoRA's fields that only training reads."""

_HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica")
"""Ways to initialise that leave the base weights alone; as do true and false."""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The served fields of a config, checked."""

    kind: str  # LORA or ADALORA
    r: int  # of AdaLoRA: init_r
    alpha: float
    use_rslora: bool
    targets: Targets
    all_linear: bool  # targets holds no names then
    ranks: PatternMap
    alphas: PatternMap
    kept_ranks: Mapping[str, int]  # AdaLoRA: module -> rank, where it is not r
    use_dora: bool
    lora_bias: bool
    saved: SavedModules
    tokens: Mapping[str, tuple[int, ...]]  # end of a module's name, "" for the input embedding -> trained token ids
    parameters: tuple[str, ...]  # ends of the names of adapted parameters
    invocation: tuple[int, ...]
    tie: bool  # what is done to the input embedding is done to a tied head

    def rank(self, site: str) -> int:
        """Return the rank at a layer or parameter."""
        return self.kept_ranks.get(site, self.r) if self.kind == ADALORA else self.ranks.get(site, self.r)

    def scale(self, site: str) -> float:
        """Return what the product of the matrices is multiplied by at a layer or parameter."""
        rank = self.rank(site)
        if self.kind == ADALORA:
            return (self.alpha if self.alpha > 0 else float(rank)) / (self.r + 1e-5)
        alpha = self.alphas.get(site, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def parse_config(raw: bytes) -> dict[str, Any]:
    """Parse the bytes of an `adapter_config.json`. Raises AdapterRefused."""
    if len(raw) > MAX_CONFIG_BYTES:
        raise AdapterRefused([f"{CONFIG_FILE} has {len(raw)} bytes; the limit is {MAX_CONFIG_BYTES}"])
    return load_json_object(raw, CONFIG_FILE)


def canonical_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `config` that change the maths and differ from PEFT's defaults, in a fixed order.

    Read again it gives the same adapter. The order of a pattern map is kept: its first match counts.
    """
    canonical: dict[str, Any] = {}
    for key in (*_DEFAULTS, *_SERVED, *_UNSERVED, "bias", "init_lora_weights", TEXTS_FIELD):
        value = config.get(key)
        if key in ("target_modules", "exclude_modules", "modules_to_save") and isinstance(value, list):
            value = sorted(set(map(str, value)))
        if key == "bias" and value == "none":
            continue
        if key == "init_lora_weights" and (isinstance(value, bool) or value in _HARMLESS_INITS):
            continue
        if value is None or (key in _DEFAULTS and value == _DEFAULTS[key]):
            continue
        if key not in _DEFAULTS and not _is_on(key, value):
            continue
        canonical[key] = value
    return canonical


def read_config(config: Mapping[str, Any], reasons: Reasons) -> AdapterConfig | None:
    """Check a whole config. None, with reasons, if one of its fields is wrong; other reasons may be added as well."""
    before = len(reasons)
    kind = LORA if config.get("peft_type") == LORA else ADALORA
    _check_features(config, kind, reasons)
    unserved = len(reasons)
    value = {key: config.get(key, default) for key, default in _DEFAULTS.items()}
    rank_field = "r" if kind == LORA else "init_r"
    r = value["r"] if kind == LORA else config.get("init_r", 12)
    if type(r) is not int:
        reasons.add(f"{rank_field} {show(r)} is not a whole number")
    if not _is_alpha(value["lora_alpha"]):
        reasons.add(f"lora_alpha {show(value['lora_alpha'])} is not a finite number")
    flags = {key: _read_flag(config, key, reasons) for key in ("use_rslora", "use_dora", "lora_bias")}
    kept = _read_kept_ranks(value["rank_pattern"], reasons) if kind == ADALORA else {}
    rank_pattern = value["rank_pattern"] if kind == LORA else {}
    ranks = _read_pattern_map("rank_pattern", rank_pattern, lambda item: type(item) is int, reasons)
    alphas = _read_pattern_map("alpha_pattern", value["alpha_pattern"], _is_alpha, reasons)
    parameters = _read_parameters(config.get("target_parameters") or [], reasons)
    targets = _read_targets(value, parameters, reasons)
    saved = _read_saved(config.get("modules_to_save") or [], reasons)
    tokens = _read_tokens(config.get("trainable_token_indices"), reasons)
    invocation = _read_ids("alora_invocation_tokens", config.get("alora_invocation_tokens") or [], reasons)
    if len(reasons) > unserved or ranks is None or alphas is None or targets is None or saved is None:
        return None
    result = AdapterConfig(
        kind=kind, r=r, alpha=value["lora_alpha"], **flags, targets=targets,
        all_linear=_is_all_linear(value["target_modules"]), ranks=ranks, alphas=alphas, kept_ranks=kept, saved=saved,
        tokens=tokens, parameters=parameters, invocation=invocation, tie=bool(config.get("ensure_weight_tying")),
    )  # fmt: skip
    if len(reasons) == before:
        _check_combinations(config, result, reasons)
    return result


def _check_features(config: Mapping[str, Any], kind: str, reasons: Reasons) -> None:
    """Note every feature that is switched on and not served, and every field that is not known."""
    for key, feature in _UNSERVED.items():
        if _is_on(key, config.get(key)):
            reasons.add(f"{key} ({feature}) is not served")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):  # PEFT loads no null either
        reasons.add(f"bias {show(config['bias'])} is not none, all or lora_only")
    init = config.get("init_lora_weights")
    if not (init is None or isinstance(init, bool) or init in _HARMLESS_INITS):
        reasons.add(
            f"init_lora_weights {show(init)} changes the base weights: convert the adapter when saving it "
            "(path_initial_model_for_weight_conversion)"
        )
    known = {*_DEFAULTS, *_SERVED, *_UNSERVED, *_NO_EFFECT}
    known = known | _ADALORA_TRAINING if kind == ADALORA else known - {"init_r"}
    for key, value in config.items():
        if value and key not in known:
            reasons.add("config fields that are not understood", key)


def _is_on(key: str, value: Any) -> bool:
    return value is not None if key in _OBJECTS else bool(value)


def _check_combinations(config: Mapping[str, Any], read: AdapterConfig, reasons: Reasons) -> None:
    """Note what PEFT does not combine."""
    variants = {
        "use_dora": read.use_dora,
        "alora_invocation_tokens": bool(read.invocation),
        "init_lora_weights mica": config.get("init_lora_weights") == "mica",
    }
    chosen = [name for name, is_on in variants.items() if is_on]
    if len(chosen) > 1:
        reasons.add(f"PEFT does not combine {' and '.join(chosen)}")
    if read.lora_bias and read.use_dora:
        reasons.add("PEFT does not combine lora_bias and use_dora")
    if read.lora_bias and isinstance(config.get("init_lora_weights"), str):
        reasons.add(f"PEFT does not combine lora_bias and init_lora_weights {show(config['init_lora_weights'])}")
    if read.parameters and (chosen or read.lora_bias):
        reasons.add(f"PEFT does not combine target_parameters and {chosen[0] if chosen else 'lora_bias'}")
    if read.kind == ADALORA:
        for key in ("use_dora", "lora_bias", "use_rslora", "alora_invocation_tokens", "target_parameters"):
            if config.get(key):
                reasons.add(f"AdaLoRA has no {key}")


# ---------------------------------------------------------------- single fields


def _read_flag(config: Mapping[str, Any], key: str, reasons: Reasons) -> bool:
    value = config.get(key)
    if value and not isinstance(value, bool):
        reasons.add(f"{key} {show(value)} is not true or false")
    return bool(value)


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _MAX_FLOAT32  # false for NaN too


def _read_pattern_map(name: str, value: Any, valid: Callable[[Any], bool], reasons: Reasons) -> PatternMap | None:
    if not isinstance(value, dict) or len(value) > MAX_PATTERNS:
        reasons.add(f"{name} is not a map of at most {MAX_PATTERNS} patterns to numbers")
        return None
    for key, item in value.items():
        if not valid(item):
            reasons.add(f"{name} has values that are not valid numbers", key)
    try:
        return PatternMap(value)
    except BadPattern as error:
        reasons.add(f"{name}: {error}")
        return None


def _read_kept_ranks(value: Any, reasons: Reasons) -> dict[str, int]:
    """Read AdaLoRA's rank_pattern: for each `MODULE.lora_E` which of the singular values are kept."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        reasons.add("rank_pattern is not a map of names to lists of true and false")
        return {}
    kept: dict[str, int] = {}
    for name, flags in value.items():
        if not isinstance(flags, list) or not all(isinstance(flag, bool) for flag in flags):
            reasons.add("rank_pattern has values that are not lists of true and false", name)
        else:
            kept[name.rpartition(".")[0]] = sum(flags)
    return kept


def _read_targets(value: Mapping[str, Any], parameters: tuple[str, ...], reasons: Reasons) -> Targets | None:
    """Read the fields that choose layers. None, with reasons, if one of them is wrong."""
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
        names = Names.read([] if _is_all_linear(targets) else targets)
        return Targets(names, Names.read(excluded) if excluded else None, _read_layers(value, reasons))
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
    if not isinstance(indices, list) or any(type(index) is not int for index in indices) or not _are_names(patterns):
        reasons.add("layers_to_transform or layers_pattern is of the wrong type")
        return None
    if len(value["target_modules"] or []) >= MIN_CONDENSED_TARGETS:
        reasons.add(f"layers_to_transform with {MIN_CONDENSED_TARGETS} or more target_modules is ambiguous in PEFT")
        return None
    return Layers.read(indices, patterns)


def _read_parameters(value: Any, reasons: Reasons) -> tuple[str, ...]:
    if not _are_names(value):
        reasons.add(f"target_parameters {show(value)} is not a list of names")
        return ()
    return tuple(value)


def _read_saved(value: Any, reasons: Reasons) -> SavedModules | None:
    if not _are_names(value) or not all(value):
        reasons.add(f"modules_to_save {show(value)} is not a list of names")
        return None
    try:
        return SavedModules.read(value)
    except BadPattern as error:
        reasons.add(f"a name in modules_to_save {error}")
        return None


def _read_tokens(value: Any, reasons: Reasons) -> dict[str, tuple[int, ...]]:
    """Read `trainable_token_indices`: a list for the input embedding, or a list per module."""
    if not value:
        return {}
    by_module = value if isinstance(value, dict) else {"": value}
    return {name: _read_ids("trainable_token_indices", ids, reasons) for name, ids in by_module.items()}


def _read_ids(name: str, value: Any, reasons: Reasons) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 1 << 31 for item in value):
        reasons.add(f"{name} {show(value)} is not a list of token ids")
        return ()
    if name == "trainable_token_indices" and len(set(value)) != len(value):
        reasons.add("trainable_token_indices names a token twice")
    return tuple(value)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_NAMES and all(isinstance(item, str) for item in value)


def _is_all_linear(targets: Any) -> bool:
    return isinstance(targets, str) and targets.lower() == "all-linear"
