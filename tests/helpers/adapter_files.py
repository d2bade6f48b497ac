"""Adapters written byte by byte, without torch: valid ones for BASE, and malicious ones."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peft_adapters.format import CONFIG_FILE, WEIGHTS_FILE
from protocol.wire import messages as m

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
    """Return a safetensors file of float32 tensors; `changes` replace header entries, and None removes one."""
    header: dict[str, Any] = {}
    body = b""
    for name, tensor in tensors.items():
        raw = np.ascontiguousarray(tensor, dtype="<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    header |= changes
    head = json.dumps({name: entry for name, entry in header.items() if entry is not None}).encode()
    return len(head).to_bytes(8, "little") + head + body


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
