"""Reads PEFT LoRA adapters: safetensors headers, `adapter_config.json`, which tensor belongs to which layer.

Pure: no torch, no files. The store validates with it, the worker loads by it. An adapter is read exactly as PEFT 0.21
would apply it, or refused with every reason at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from protocol.errors import AdapterRefused
from protocol.messages import ServedModel, SiteShape
from protocol.peft_targets import MIN_CONDENSED_TARGETS, BadPattern, Layers, Names, PatternMap, Targets
from protocol.reasons import Reasons, load_json_object, show
from protocol.safetensors_header import MAX_HEADER_BYTES, TensorInfo, parse_header

__all__ = [
    "CONFIG_FILE", "MAX_HEADER_BYTES", "WEIGHTS_FILE", "AdapterSpec", "SiteWeights", "TensorInfo", "adapter_digest",
    "canonical_config", "parse_config", "parse_header", "read_adapter",
]  # fmt: skip

MAX_CONFIG_BYTES = 1 << 20
MAX_PATTERNS = 4_096
MAX_NAMES = 20_000

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_MAX_FLOAT32 = 3.4028234663852886e38
_LORA_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight", re.DOTALL)


# ---------------------------------------------------------------- adapter_config.json

_DEFAULTS: dict[str, Any] = {
    "peft_type": None, "r": 8, "lora_alpha": 8, "use_rslora": False, "target_modules": None, "exclude_modules": None,
    "layers_to_transform": None, "layers_pattern": None, "rank_pattern": {}, "alpha_pattern": {},
}  # fmt: skip
"""The fields that change the maths and are served, with PEFT's defaults."""

_UNSERVED = {
    "use_dora": "DoRA", "lora_bias": "a bias on lora_B", "modules_to_save": "fully trained modules",
    "trainable_token_indices": "trained tokens", "target_parameters": "LoRA on parameters",
    "alora_invocation_tokens": "activated LoRA", "layer_replication": "replicated layers", "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA", "arrow_config": "Arrow routing", "kasa_config": "KaSA", "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA", "megatron_config": "Megatron layers", "ensure_weight_tying": "tied adapters",
}  # fmt: skip
"""Features refused by name when they are switched on."""

_NO_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "fan_in_fan_out", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "runtime_config", "bias", "init_lora_weights",
}  # fmt: skip
"""Fields without effect on inference. The last two have their own check; of `fan_in_fan_out` PEFT takes the layer's
own value; the `*_config` ones configure an `init_lora_weights`."""

_HARMLESS_INITS = ("gaussian", "eva", "orthogonal")
"""Ways to initialise that leave the base weights alone; as do true and false."""


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
    for key in (*_DEFAULTS, *_UNSERVED, "bias", "init_lora_weights"):
        value = config.get(key)
        if key in ("target_modules", "exclude_modules") and isinstance(value, list):
            value = sorted(set(map(str, value)))
        if key == "bias" and value == "none":
            continue
        if key == "init_lora_weights" and (isinstance(value, bool) or value in _HARMLESS_INITS):
            continue
        if value is None or (key in _DEFAULTS and value == _DEFAULTS[key]) or (key in _UNSERVED and not value):
            continue
        canonical[key] = value
    return canonical


def adapter_digest(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], weights: Any) -> str:
    """Return the adapter's identity: sha256 (hex) over canonical config and every tensor's name, dtype, shape, bytes.

    `weights` is the whole safetensors file as a buffer (bytes, memoryview, mmap). Where in the file a tensor lies, and
    the file's metadata, do not matter. Large tensors are hashed without holding the interpreter lock.
    """
    total = hashlib.sha256(json.dumps(canonical_config(config), separators=(",", ":")).encode())
    with memoryview(weights) as view:
        for name, tensor in sorted(tensors.items()):
            with view[tensor.begin : tensor.end] as part:
                content = hashlib.sha256(part).hexdigest()
            total.update(json.dumps([name, tensor.dtype, tensor.shape, content]).encode())
    return total.hexdigest()


# ---------------------------------------------------------------- the adapter


@dataclass(frozen=True, slots=True)
class SiteWeights:
    """LoRA of one layer: it adds `scale * B @ A @ x`."""

    site: str  # module name in the base, SiteShape.name
    rank: int
    scale: float
    a: str  # name of the tensor [rank, in_features]
    b: str  # name of the tensor [out_features, rank]


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """What an adapter changes, in the order of the base model's sites."""

    sites: tuple[SiteWeights, ...]
    rank: int  # largest of the sites'

    @property
    def modules(self) -> list[str]:
        """Kinds of layers touched, such as "q_proj"."""
        return sorted({site.site.rpartition(".")[2] for site in self.sites})


def read_adapter(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], base: ServedModel | None) -> AdapterSpec:
    """Read an adapter as PEFT would apply it to `base`; without a base, check all that can be without one.

    Every tensor must be used and every layer that the config targets must have its tensors.
    Raises AdapterRefused with all reasons.
    """
    if config.get("peft_type") != "LORA":
        raise AdapterRefused([f"peft_type {show(config.get('peft_type'))} is not served; only LORA is"])
    reasons = Reasons()
    _check_features(config, reasons)
    fields = _read_fields(config, reasons)
    pairs = _pair_tensors(tensors, reasons)
    if fields is None:
        raise AdapterRefused(reasons.render())
    sites = base.sites if base else _sites_of_file(pairs, tensors)
    targeted = _targeted(fields, sites, base)
    if not targeted:
        reasons.add("target_modules matches no layer of the base model")
    _check_unused(pairs, {site.name for site in targeted}, {site.name for site in sites}, reasons)
    found = [_read_site(site, fields, pairs.get(site.name, {}), tensors, reasons) for site in targeted]
    if reasons:
        raise AdapterRefused(reasons.render())
    weights = tuple(site for site in found if site is not None)
    return AdapterSpec(weights, max(site.rank for site in weights))


@dataclass(frozen=True, slots=True)
class _Fields:
    """The served fields of a config, checked."""

    r: int
    alpha: float
    use_rslora: bool
    targets: Targets
    all_linear: bool  # targets holds no names then
    ranks: PatternMap
    alphas: PatternMap


def _check_features(config: Mapping[str, Any], reasons: Reasons) -> None:
    """Note every feature that is switched on and not served, and every field that is not known."""
    for key, feature in _UNSERVED.items():
        if config.get(key):
            reasons.add(f"{key} ({feature}) is not served")
    if config.get("bias") not in (None, "none"):
        reasons.add(f"bias {show(config['bias'])} (trained biases) is not served")
    init = config.get("init_lora_weights")
    if not (init is None or isinstance(init, bool) or init in _HARMLESS_INITS):
        reasons.add(
            f"init_lora_weights {show(init)} changes the base weights: convert the adapter when saving it "
            "(path_initial_model_for_weight_conversion)"
        )
    for key, value in config.items():
        if value and key not in _DEFAULTS and key not in _UNSERVED and key not in _NO_EFFECT:
            reasons.add("config fields that are not understood", key)


def _read_fields(config: Mapping[str, Any], reasons: Reasons) -> _Fields | None:
    """Return the checked fields, None (with reasons) if one of them is wrong."""
    before = len(reasons)
    value = {key: config.get(key, default) for key, default in _DEFAULTS.items()}
    if type(value["r"]) is not int:
        reasons.add(f"r {show(value['r'])} is not a whole number")
    if not _is_alpha(value["lora_alpha"]):
        reasons.add(f"lora_alpha {show(value['lora_alpha'])} is not a finite number")
    if not isinstance(value["use_rslora"], bool):
        reasons.add(f"use_rslora {show(value['use_rslora'])} is not true or false")
    ranks = _read_pattern_map("rank_pattern", value["rank_pattern"], lambda item: type(item) is int, reasons)
    alphas = _read_pattern_map("alpha_pattern", value["alpha_pattern"], _is_alpha, reasons)
    targets = _read_targets(value, reasons)
    if len(reasons) > before or ranks is None or alphas is None or targets is None:
        return None
    all_linear = _is_all_linear(value["target_modules"])
    return _Fields(value["r"], value["lora_alpha"], value["use_rslora"], targets, all_linear, ranks, alphas)


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


def _read_targets(value: Mapping[str, Any], reasons: Reasons) -> Targets | None:
    """Read the fields that choose layers. None, with reasons, if one of them is wrong."""
    targets, excluded, layers = value["target_modules"], value["exclude_modules"], value["layers_to_transform"]
    if not isinstance(targets, str) and not (_are_names(targets) and targets):
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
    if len(value["target_modules"]) >= MIN_CONDENSED_TARGETS:
        reasons.add(f"layers_to_transform with {MIN_CONDENSED_TARGETS} or more target_modules is ambiguous in PEFT")
        return None
    return Layers.read(indices, patterns)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_NAMES and all(isinstance(item, str) for item in value)


def _is_all_linear(targets: Any) -> bool:
    return isinstance(targets, str) and targets.lower() == "all-linear"


# ---------------------------------------------------------------- config and tensors together

_Pair = dict[str, str]  # "A" or "B" -> tensor name


def _pair_tensors(tensors: Mapping[str, TensorInfo], reasons: Reasons) -> dict[str, _Pair]:
    """Group the tensors by the module they adapt; note those that are no LoRA of a linear layer."""
    pairs: dict[str, _Pair] = {}
    for name in tensors:
        match = _LORA_TENSOR.fullmatch(name)
        if match is None:
            reasons.add("tensors that are not understood", name)
        else:
            pairs.setdefault(match[1], {})[match[2]] = name
    return pairs


def _sites_of_file(pairs: Mapping[str, _Pair], tensors: Mapping[str, TensorInfo]) -> list[SiteShape]:
    """Return the layers as the file describes them, for want of a base model."""

    def size(pair: _Pair, half: str, axis: int) -> int:
        return tensors[pair[half]].shape[axis] if half in pair else 0

    return [SiteShape(module, size(pair, "A", -1), size(pair, "B", 0)) for module, pair in sorted(pairs.items())]


def _targeted(fields: _Fields, sites: Iterable[SiteShape], base: ServedModel | None) -> list[SiteShape]:
    """Return the sites that the config means."""
    targets = fields.targets
    if fields.all_linear:
        linear = [site.name for site in sites if site.kind != "embedding" and not (base and _is_output(site, base))]
        targets = replace(targets, targets=Names(frozenset(linear)))
    return [site for site in sites if targets.chosen(site.name)]


def _is_output(site: SiteShape, base: ServedModel) -> bool:
    """Tell whether a layer is the language model's head, which PEFT leaves out of "all-linear"."""
    return site.out_features == base.vocab_size and not any(part.isdigit() for part in site.name.split("."))


def _check_unused(pairs: Mapping[str, _Pair], targeted: set[str], known: set[str], reasons: Reasons) -> None:
    """Note the tensors that no targeted site uses."""
    for module in sorted(pairs.keys() - targeted):
        if module in known:
            reasons.add("tensors for layers that the config does not target", module)
        else:
            reasons.add("tensors for layers that the base model does not have or cannot adapt", module)


def _read_site(
    site: SiteShape, fields: _Fields, pair: _Pair, tensors: Mapping[str, TensorInfo], reasons: Reasons
) -> SiteWeights | None:
    """Return the LoRA of one targeted site, None (with reasons) if something is wrong with it."""
    before = len(reasons)
    rank, alpha = fields.ranks.get(site.name, fields.r), fields.alphas.get(site.name, fields.alpha)
    if site.kind == "embedding":
        reasons.add("LoRA on embeddings is not served", site.name)
        return None
    if rank <= 0:
        reasons.add(f"rank {rank} is not positive", site.name)
        return None
    for half, shape in (("A", (rank, site.in_features)), ("B", (site.out_features, rank))):
        if half not in pair:
            reasons.add("tensors missing for targeted layers", f"{site.name}.lora_{half}")
        elif tensors[pair[half]].shape != shape:
            found = list(tensors[pair[half]].shape)
            reasons.add(f"lora_{half} has shape {found} where config and base model want {list(shape)}", site.name)
    if len(reasons) > before:
        return None
    scale = alpha / math.sqrt(rank) if fields.use_rslora else alpha / rank
    return SiteWeights(site.name, rank, scale, pair["A"], pair["B"])
