"""Adapter files: invalid configs, safetensors headers and texts are refused, or read as PEFT reads them."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import msgspec
import numpy as np
from helpers.adapter_files import BASE, lora_config, lora_tensors, safetensors
from helpers.kind_files import kind_config, kind_tensors
from helpers.virtual_files import VIRTUAL_BASE, virtual_config, virtual_tensors
from hostile.fuzz import odd
from hostile.fuzz.engine import Target, pure
from hypothesis import strategies as st

from gpu_worker.adapters.packing.rows import RowPacker, RowSite, read_numbers
from peft_adapters import config as config_module
from peft_adapters.effect import has_effect
from peft_adapters.format import adapter_digest, canonical_config, parse_config, parse_header, read_adapter
from peft_adapters.kinds.registry import NAMES as KIND_NAMES
from peft_adapters.kinds.registry import kind_of
from peft_adapters.kinds.virtual import NO_EFFECT, fields_of
from peft_adapters.texts.files import TEXT_FILES, parse_texts, read_texts
from protocol.wire.errors import AdapterRefused

WEIGHTS = safetensors(lora_tensors())
TENSORS = parse_header(WEIGHTS, len(WEIGHTS))
HEAD_BYTES = 8 + int.from_bytes(WEIGHTS[:8], "little")
HEADER: dict[str, Any] = json.loads(WEIGHTS[8:HEAD_BYTES])

FIELDS = (
    *config_module._DEFAULTS, *config_module._SERVED, *config_module._UNSERVED, *sorted(config_module._NO_EFFECT),
    *sorted(config_module._ADALORA_TRAINING), "never_heard_of",
)  # fmt: skip
LIKELY = (
    0, 1, 8, -1, 1e9, True, False, None, "all-linear", "q_proj", "v_proj", ".*", "(a+)+$", "(?P<x>", "LORA", "ADALORA",
    [], ["q_proj"], ["lm_head"], ["q_proj"] * 500, {}, {"q_proj": 4}, {"q_proj": -1}, {".*": 2}, {"(a+)+b": 1},
    [0, 1], [1 << 40], {"embed_tokens": [1, 2]}, [[1]], {"": ""},
)  # fmt: skip


@st.composite
def configs(draw: st.DrawFn) -> bytes:
    """Draw a valid config with odd fields, or damaged bytes of one."""
    config = lora_config()
    for _ in range(draw(st.integers(1, 4))):
        value = draw(st.one_of(st.sampled_from(LIKELY), odd.wild_values))
        config[draw(st.one_of(st.sampled_from(FIELDS), odd.texts))] = value
    raw = odd.written(config)
    return draw(odd.damaged(st.just(raw))) if draw(st.integers(0, 4)) == 0 else raw


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """Draw the head of a weights file with replaced entries, changed names, wrong lengths, or damaged bytes."""
    header = json.loads(json.dumps(HEADER))
    names = sorted(header)
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(names))
        if name not in header:
            continue
        how = draw(st.sampled_from(["value", "field", "drop", "rename", "add", "metadata"]))
        if how == "value":
            header[name] = draw(odd.wild_values)
        elif how == "field" and isinstance(header[name], dict):
            likely = st.sampled_from(
                ["F32", "BF16", "I64", [4, 16], [0, 0], [1 << 47, 1 << 47], [0, 1 << 62], [-1], []]
            )
            field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
            header[name][field] = draw(st.one_of(likely, odd.wild_values))
        elif how == "drop":
            del header[name]
        elif how == "rename":
            header[draw(odd.texts) + name.replace("lora_A", draw(st.sampled_from(PARTS)))] = header.pop(name)
        elif how == "add":
            header[draw(odd.texts)] = header[name]
        else:
            header["__metadata__"] = draw(odd.values)
    raw = odd.written(header)
    lies = draw(st.sampled_from([0, 0, 0, 1, -1, 8, 1 << 20, 1 << 62, -len(raw)]))
    head = max(0, min(len(raw) + lies, (1 << 64) - 1)).to_bytes(8, "little") + raw
    return draw(odd.damaged(st.just(head))) if draw(st.integers(0, 3)) == 0 else head


LIKELY_ENTRIES = ("F32", "BF16", "I64", [4, 16], [0, 0], [1 << 47, 1 << 47], [0, 1 << 62], [-1], [])
PARTS = ("lora_B", "lora_embedding_A", "lora_magnitude_vector", "modules_to_save", "base_layer", "lora_E", "", "0")


def _check_config(raw: bytes) -> str:
    try:
        config = parse_config(raw)
        spec = read_adapter(config, TENSORS, BASE)
    except AdapterRefused as refusal:
        return odd.kind_of(refusal)
    json.dumps(canonical_config(config))
    assert adapter_digest(config, TENSORS, WEIGHTS)
    return f"read as {config.get('peft_type')}, rank {spec.rank}"


def _check_header(head: bytes) -> str:
    try:
        tensors = parse_header(head, len(head) + len(WEIGHTS) - HEAD_BYTES)
    except AdapterRefused as refusal:
        return odd.kind_of(refusal)
    try:
        read_adapter(lora_config(), tensors, BASE)
    except AdapterRefused as refusal:
        return odd.kind_of(refusal)
    return "read"


@st.composite
def text_files(draw: st.DrawFn) -> dict[str, bytes]:
    """Draw an adapter's text files: JSON of any kind, damaged JSON, or bytes."""
    contents = st.one_of(
        odd.wild_values.map(odd.written),
        st.dictionaries(st.sampled_from(TEXT_FIELDS), odd.values, max_size=4).map(odd.written),
        odd.damaged(st.just(b'{"chat_template": [{"name": "default", "template": "{{ messages }}"}]}')),
        st.binary(max_size=30),
    )
    return draw(st.dictionaries(st.sampled_from(TEXT_FILES), contents, max_size=4))


TEXT_FIELDS = ("chat_template", "eos_token", "bos_token", "model", "decoder", "added_tokens", "extra_special_tokens")


def _check_texts(files: dict[str, bytes]) -> str:
    try:
        texts = read_texts(files)
    except AdapterRefused as refusal:
        return odd.kind_of(refusal)
    if texts is None:
        return "none"
    raw = msgspec.json.encode(texts)
    assert parse_texts(raw, hashlib.sha256(raw).hexdigest()) == texts
    return "taken with a template" if texts.template else "taken"


# ---------------------------------------------------------------- kinds other than LoRA

KIND_FIELDS = ("peft_type", "target_modules", "rank_pattern", "alpha_pattern", "bias", "modules_to_save", "odd")


@st.composite
def kind_files(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Draw config and weights of an adapter of another kind than LoRA, with a few errors."""
    name = draw(st.sampled_from((*KIND_NAMES, *NO_EFFECT)))
    kind = kind_of(name)
    if kind is None:
        config, tensors = virtual_config(name), virtual_tensors(name)
    else:
        config = kind_config(name)
        tensors = kind_tensors(config, seed=draw(st.integers(0, 3)))
    fields = (*KIND_FIELDS, *(fields_of(name) if kind is None else kind.fields))
    for _ in range(draw(st.integers(0, 2))):
        config[draw(st.sampled_from(fields))] = draw(st.one_of(st.sampled_from(LIKELY), odd.wild_values))
    for _ in range(draw(st.integers(0, 2))):
        tensor = draw(st.sampled_from(sorted(tensors)))
        change = draw(st.sampled_from(("drop", "rename", "shape", "worst", "whole")))
        if change == "drop" and len(tensors) > 1:
            del tensors[tensor]
        elif change == "rename":
            tensors[draw(st.sampled_from(("base_model.x", f"{tensor}.y", "base_model.model.lm_head.weight")))] = (
                tensors.pop(tensor)
            )
        elif change == "shape":
            tensors[tensor] = np.zeros(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)), np.float32)
        elif change == "worst":
            worst = draw(st.sampled_from((np.nan, np.inf, -3e38, 255.0)))
            tensors[tensor] = np.full_like(tensors[tensor], 255 if tensors[tensor].dtype == np.uint8 else worst)
        else:
            tensors[tensor] = np.zeros(tensors[tensor].shape, np.uint8)
    return odd.written(config), safetensors(tensors)


def _check_kind(files: tuple[bytes, bytes]) -> str:
    """Read an adapter as a store does, and pack it as a worker's loader does."""
    raw, weights = files
    try:
        config = parse_config(raw)
        tensors = parse_header(weights, len(weights))
        spec = read_adapter(config, tensors, VIRTUAL_BASE)
        json.dumps(canonical_config(config))
        assert adapter_digest(config, tensors, weights)
        has_effect(spec, tensors, memoryview(weights))
        packed = PACKER.pack(config, weights, bytearray)
        for part in spec.operations:
            part.change(lambda name: read_numbers(weights, tensors[name]))
    except AdapterRefused as refusal:
        return odd.kind_of(refusal)
    return f"{config.get('peft_type')} {'packed' if packed is not None else 'read'}"


PACKER = RowPacker(
    [RowSite(site.name, site.in_features, site.out_features, "float32") for site in BASE.sites], VIRTUAL_BASE
)  # fmt: skip

TARGETS = (
    Target("kinds besides LoRA", kind_files(), pure(_check_kind)),
    Target("adapter config", configs(), pure(_check_config)),
    Target("safetensors header", headers(), pure(_check_header)),
    Target("text files of an adapter", text_files(), pure(_check_texts)),
)
