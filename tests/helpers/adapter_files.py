"""Adapters written byte by byte, without torch: valid ones for BASE, and malicious ones; what is read of them."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_adapters.effect import has_effect
from peft_adapters.format import CONFIG_FILE, WEIGHTS_FILE, AdapterSpec, TensorInfo, parse_header, read_adapter
from protocol.wire import messages as m
from protocol.wire.errors import AdapterRefused

HIDDEN = 16
BASE = m.ServedModel(
    model="tiny",
    name="tiny",
    fingerprint="f1",
    model_type="llama",
    vocab_size=64,
    max_model_len=128,
    sites=[
        m.SiteShape(f"model.layers.{layer}.self_attn.{site}", HIDDEN, HIDDEN)
        for layer in range(2)
        for site in ("q_proj", "v_proj")
    ],
)


def safetensors(tensors: Mapping[str, np.ndarray[Any, Any]], **changes: Any) -> bytes:
    """Return a file of tensors, bytes or float32; `changes` replace header entries, and None removes one."""
    header: dict[str, Any] = {}
    body = b""
    for name, tensor in tensors.items():
        stored, dtype = ("U8", "u1") if tensor.dtype == np.uint8 else ("F32", "<f4")
        raw = np.ascontiguousarray(tensor, dtype=dtype).tobytes()
        header[name] = {"dtype": stored, "shape": list(tensor.shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    header |= changes
    head = json.dumps({name: entry for name, entry in header.items() if entry is not None}).encode()
    return len(head).to_bytes(8, "little") + head + body


def parsed(tensors: Mapping[str, np.ndarray[Any, Any]]) -> tuple[bytes, dict[str, TensorInfo]]:
    """Return a safetensors file, and what its header says."""
    raw = safetensors(tensors)
    return raw, parse_header(raw, len(raw))


def read_file(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray[Any, Any]], base: m.ServedModel | None = BASE
) -> AdapterSpec:  # fmt: skip
    return read_adapter(config, parsed(tensors)[1], base)


def effect(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray[Any, Any]], base: m.ServedModel = BASE) -> bool:
    raw, infos = parsed(tensors)
    return has_effect(read_adapter(config, infos, base), infos, memoryview(raw))


def refusal(reads: Callable[..., object], *given: Any, **more: Any) -> str:
    """Return why an adapter is refused, a reason a line."""
    with pytest.raises(AdapterRefused) as refused:
        reads(*given, **more)
    text = "\n".join(refused.value.reasons)
    assert len(text) < 10_000
    return text


def lora_tensors(
    seed: int = 0, rank: int = 4, sites: Sequence[m.SiteShape] = BASE.sites
) -> dict[str, np.ndarray[Any, Any]]:
    """Return random lora_A and lora_B matrices for the sites of BASE."""
    generator = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for site in sites:
        prefix = f"base_model.model.{site.name}"
        tensors[f"{prefix}.lora_A.weight"] = generator.normal(size=(rank, site.in_features))
        tensors[f"{prefix}.lora_B.weight"] = generator.normal(size=(site.out_features, rank))
    return tensors


def lora_config(rank: int = 4, **fields: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **fields}


def adapter_bytes(
    seed: int = 0, rank: int = 4, sites: Sequence[m.SiteShape] = BASE.sites, **fields: Any
) -> dict[str, bytes]:
    """Return the files of a valid adapter for BASE, by name."""
    weights = safetensors(lora_tensors(seed, rank, sites))
    return {CONFIG_FILE: json.dumps(lora_config(rank, **fields)).encode(), WEIGHTS_FILE: weights}


def write_adapter(folder: Path, seed: int = 0, rank: int = 4, **fields: Any) -> Path:
    """Write a valid adapter for BASE; files already in the folder are overwritten."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, raw in adapter_bytes(seed, rank, **fields).items():
        (folder / name).write_bytes(raw)
    return folder


def zipped(files: Mapping[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return a zip. files: path -> content."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", how) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return raw.getvalue()
