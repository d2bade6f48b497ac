"""Reads `adapter_config.json`: each field is supported, refused by name, or has no effect."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft_adapters.config_fields import (
    is_all_linear,
    is_alpha,
    is_rank,
    read_flag,
    read_ids,
    read_kept_ranks,
    read_parameters,
    read_pattern_map,
    read_saved,
    read_targets,
    read_tokens,
)
from peft_adapters.json_values import is_list, load_json_object
from peft_adapters.kinds.converted import CONVERTED_FIELD
from peft_adapters.kinds.kind import Kind
from peft_adapters.kinds.registry import kind_of
from peft_adapters.kinds.virtual import canonical_virtual, is_virtual
from peft_adapters.reasons import Reasons, show
from peft_adapters.targets import NameTargets, PatternMap, SavedModules, Targets
from peft_adapters.texts.files import TEXTS_FIELD
from protocol.wire.errors import AdapterRefused

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 19

LORA, ADALORA = "LORA", "ADALORA"

_DEFAULTS: dict[str, Any] = {
    "peft_type": None, "r": 8, "lora_alpha": 8, "use_rslora": False, "target_modules": None, "exclude_modules": None,
    "layers_to_transform": None, "layers_pattern": None, "rank_pattern": {}, "alpha_pattern": {},
}  # fmt: skip
"""The fields of plain LoRA that affect results, with PEFT's defaults."""

_SERVED = (
    "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters",
    "alora_invocation_tokens", "ensure_weight_tying", "init_r",
)  # fmt: skip
"""Further supported fields that affect results. If absent, null, false or empty, they have no effect."""

_UNSERVED = {
    "layer_replication": "replicated layers",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "megatron_config": "Megatron layers",
}
"""Unsupported features, refused by name if enabled."""

_OBJECTS = {"use_bdlora", *(key for key in _UNSERVED if key.endswith("_config"))}
"""Unsupported features whose field is an object: PEFT treats {} as enabled, and fails on false."""

_NO_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "fan_in_fan_out", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    CONVERTED_FIELD, "qalora_group_size", "runtime_config", "bias", "init_lora_weights", TEXTS_FIELD,
}  # fmt: skip
"""Fields without effect on the weights.

`bias` and `init_lora_weights` are checked separately; biases are recognized by their tensors. PEFT replaces
`fan_in_fan_out` with the layer's own value. The `*_config` fields configure an `init_lora_weights`.
"""

_ADALORA_TRAINING = {"target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"}
"""AdaLoRA fields that only training reads."""

_COMMON = (
    "peft_type",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
)
"""The fields of `_DEFAULTS` that other kinds share with LoRA; they also have `modules_to_save` and `bias`."""

ALWAYS_WITHOUT_EFFECT = frozenset(
    {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
     "runtime_config", TEXTS_FIELD}
)  # fmt: skip
"""Fields without effect in every kind."""

_LISTS_OF_NAMES = ("target_modules", "exclude_modules", "modules_to_save", "feedforward_modules")
"""Fields that may be lists whose order is irrelevant."""

_HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica")
"""Initializations that do not change the base weights; true and false do not either."""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The significant fields of a config, validated."""

    kind: str  # LORA, ADALORA, or the name of `own`
    r: int  # AdaLoRA's init_r; 1 for kinds without a rank
    alpha: float
    use_rslora: bool
    targets: Targets
    all_linear: bool  # whether all linear layers are targeted; `targets` then has no names
    ranks: PatternMap
    alphas: PatternMap
    kept_ranks: Mapping[str, int]  # AdaLoRA's ranks by module, where they differ from r
    use_dora: bool
    lora_bias: bool
    saved: SavedModules
    tokens: Mapping[str, tuple[int, ...]]  # end of a module's name ("" for the input embedding) -> trained token ids
    parameters: tuple[str, ...]  # ends of adapted parameters' names
    invocation: tuple[int, ...]
    tie: bool  # whether a tied head gets the input embedding's changes
    own: Kind | None = None  # None: LoRA or AdaLoRA
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])  # the fields of `own`

    def rank(self, site: str) -> int:
        """Return the rank on a layer or parameter."""
        return self.kept_ranks.get(site, self.r) if self.kind == ADALORA else self.ranks.get(site, self.r)

    def scale(self, site: str) -> float:
        """Return the factor on B @ A for a layer or parameter."""
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
    """Return the fields of a config that affect results and differ from PEFT's defaults, in a fixed order.

    Used in place of the config, the result gives the same adapter. The order of a pattern map is kept, because its
    first match counts.
    """
    canonical: dict[str, Any] = {}
    own = kind_of(config.get("peft_type"))
    if own is not None:
        return _canonical_of_kind(config, own)
    if is_virtual(config.get("peft_type")):
        texts = {TEXTS_FIELD: config[TEXTS_FIELD]} if config.get(TEXTS_FIELD) else {}
        return canonical_virtual(config) | texts
    for key in (*_DEFAULTS, *_SERVED, *_UNSERVED, "bias", "init_lora_weights", TEXTS_FIELD):
        value = _in_order(key, config.get(key))
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


def _canonical_of_kind(config: Mapping[str, Any], own: Kind) -> dict[str, Any]:
    """Return the significant fields of a kind's config, like `canonical_config`."""
    canonical: dict[str, Any] = {}
    for key in (*_COMMON, *own.fields, "modules_to_save", "bias", TEXTS_FIELD):
        value = _in_order(key, config.get(key))
        if key in own.fields:
            # Values that only resemble a default, such as 1 for true, are refused, and so is null.
            default, valid = own.fields[key].default, own.fields[key].valid
            is_default = key not in config or (valid(value) and value == default)
        elif key == "bias":
            is_default = key not in config or value == "none"
        else:
            is_default = value is None or value == _DEFAULTS[key] if key in _COMMON else not value
        if not is_default:
            canonical[key] = value
    return canonical


def _in_order(key: str, value: Any) -> Any:
    """Return a field's value, sorted if it is a list whose order is irrelevant."""
    if key in _LISTS_OF_NAMES and is_list(value) and all(isinstance(item, str) for item in value):
        return sorted(set(value))
    return value


def read_config(config: Mapping[str, Any], reasons: Reasons) -> AdapterConfig | None:
    """Read and check a whole config. Return None, with reasons, if a field is wrong; may add other reasons too."""
    own = kind_of(config.get("peft_type"))
    if own is not None:
        return _read_kind(config, own, reasons)
    before = len(reasons)
    kind = LORA if config.get("peft_type") == LORA else ADALORA
    _check_features(config, kind, reasons)
    unserved = len(reasons)
    value = {key: config.get(key, default) for key, default in _DEFAULTS.items()}
    rank_field = "r" if kind == LORA else "init_r"
    r = value["r"] if kind == LORA else config.get("init_r", 12)
    if not is_rank(r):
        reasons.add(f"{rank_field} {show(r)} is not a whole number")
    if not is_alpha(value["lora_alpha"]):
        reasons.add(f"lora_alpha {show(value['lora_alpha'])} is not a finite number")
    flags = {key: read_flag(config, key, reasons) for key in ("use_rslora", "use_dora", "lora_bias")}
    kept = read_kept_ranks(value["rank_pattern"], reasons) if kind == ADALORA else {}
    rank_pattern: Any = value["rank_pattern"] if kind == LORA else {}
    ranks = read_pattern_map("rank_pattern", rank_pattern, is_rank, reasons)
    alphas = read_pattern_map("alpha_pattern", value["alpha_pattern"], is_alpha, reasons)
    parameters = read_parameters(config.get("target_parameters") or [], reasons)
    targets = read_targets(value, parameters, reasons)
    saved = read_saved(config.get("modules_to_save") or [], reasons)
    tokens = read_tokens(config.get("trainable_token_indices"), reasons)
    invocation = read_ids("alora_invocation_tokens", config.get("alora_invocation_tokens") or [], reasons)
    if len(reasons) > unserved or ranks is None or alphas is None or targets is None or saved is None:
        return None
    result = AdapterConfig(
        kind=kind, r=r, alpha=value["lora_alpha"], use_rslora=flags["use_rslora"], use_dora=flags["use_dora"],
        lora_bias=flags["lora_bias"], targets=targets,
        all_linear=is_all_linear(value["target_modules"]), ranks=ranks, alphas=alphas, kept_ranks=kept, saved=saved,
        tokens=tokens, parameters=parameters, invocation=invocation, tie=bool(config.get("ensure_weight_tying")),
    )  # fmt: skip
    if len(reasons) == before:
        _check_combinations(config, result, reasons)
    return result


def whole_modules(names: Any, reasons: Reasons) -> AdapterConfig | None:
    """Return the config of an adapter that only has whole saved modules. None, with reasons, for wrong names."""
    saved = read_saved(names, reasons)
    if saved is None:
        return None
    return AdapterConfig(
        kind=LORA,
        r=1,
        alpha=1.0,
        use_rslora=False,
        targets=Targets(NameTargets(frozenset()), None, None),
        all_linear=False,
        ranks=PatternMap({}),
        alphas=PatternMap({}),
        kept_ranks={},
        use_dora=False,
        lora_bias=False,
        saved=saved,
        tokens={},
        parameters=(),
        invocation=(),
        tie=False,
    )


def _read_kind(config: Mapping[str, Any], own: Kind, reasons: Reasons) -> AdapterConfig | None:
    """Read the config of a kind other than LoRA. Return None, with reasons, if a field is wrong."""
    before = len(reasons)
    options: dict[str, Any] = {}
    for name, field_ in own.fields.items():
        value = config.get(name, field_.default)
        if not field_.valid(value):
            reasons.add(f"{name} {show(value)} of {own.name} is not {field_.wants}")
        options[name] = value
    known = {*_COMMON, *own.fields, *own.no_effect, *ALWAYS_WITHOUT_EFFECT, "modules_to_save", "bias"}
    for key, value in config.items():
        if value and (key not in known or (key in ("rank_pattern", "alpha_pattern") and key not in own.patterns)):
            reasons.add("config fields that are not understood", key)
    bias: Any = config.get("bias", "none")
    is_own = isinstance(bias, str) and bias.lower() == f"{own.name.lower()}_only"  # PEFT documents `MiSS_only`
    if bias not in ("none", "all") and not is_own:
        reasons.add(f"bias {show(bias)} is not none, all or {own.name.lower()}_only")
    value = {key: config.get(key, _DEFAULTS[key]) for key in _COMMON}
    ranks, alphas = (
        read_pattern_map(f"{name}_pattern", value[f"{name}_pattern"], own.fields[option].valid, reasons)
        if option in own.fields
        else read_pattern_map(f"{name}_pattern", {}, is_rank, reasons)
        for name, option in (("rank", "r"), ("alpha", "alpha"))
    )
    targets = read_targets(value, (), reasons)
    saved = read_saved(config.get("modules_to_save") or [], reasons)
    if len(reasons) > before or ranks is None or alphas is None or targets is None or saved is None:
        return None
    return AdapterConfig(
        kind=own.name, r=options.get("r", 1), alpha=0.0, use_rslora=False, targets=targets,
        all_linear=is_all_linear(value["target_modules"]), ranks=ranks, alphas=alphas, kept_ranks={}, use_dora=False,
        lora_bias=False, saved=saved, tokens={}, parameters=(), invocation=(), tie=False, own=own, options=options,
    )  # fmt: skip


def _check_features(config: Mapping[str, Any], kind: str, reasons: Reasons) -> None:
    """Add reasons for every enabled unsupported feature, and for every unknown field."""
    for key, feature in _UNSERVED.items():
        if _is_on(key, config.get(key)):
            reasons.add(f"{key} ({feature}) is not served")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):  # PEFT does not load null either
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
    """Add reasons for combinations of features that PEFT does not support."""
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
