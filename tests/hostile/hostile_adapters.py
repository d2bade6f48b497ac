"""Adapters whose texts or configs are bombs. Their weights are good: only what stands beside them is not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

SPARSE_BYTES = 1_500_000_000
BOMB = [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 22
PANIC = [
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "Replace", "pattern": {"Regex": "[a-z]"}, "content": "x" * 40},
    {"type": "Replace", "pattern": {"Regex": "(?:x+x+)+y"}, "content": ""},
]
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HUNGRY = "{% set ns = namespace(t='x' * 1000) %}{% for a in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}"

TEMPLATES = [f"endless-{number}" for number in range(3)] + [f"hungry-{number}" for number in range(2)]
TOKENIZERS = ("panics", "metaspace", "giant-id", "grows", "shrinks", "deep")
CONFIGS = ("sparse", "many-saved")
GOOD_FILES = ("adapter_config.json", "adapter_model.safetensors")


def write_all(root: Path, good: Path, model: Path) -> None:
    """Write every hostile adapter below `root`, with the weights of a good one and texts like those of its model."""
    plain = json.loads((model / "tokenizer.json").read_text())
    changes: dict[str, dict[str, Any]] = {
        "panics": {"decoder": {"type": "Sequence", "decoders": PANIC}},
        "metaspace": {"decoder": METASPACE, "pre_tokenizer": METASPACE},
        "giant-id": {"model": {**plain["model"], "vocab": {**plain["model"]["vocab"], "far": 4_000_000_000}}},
        "grows": {"normalizer": {"type": "Sequence", "normalizers": BOMB}},
        "shrinks": {"decoder": {"type": "Sequence", "decoders": [plain["decoder"], *BOMB]}},
        "deep": {"normalizer": _nested({"type": "NFC"}, 90)},
    }
    for name, change in changes.items():
        _write(root, good, name, {"tokenizer.json": json.dumps({**plain, **change})})
    for name in TEMPLATES:
        source = ENDLESS if name.startswith("endless") else HUNGRY
        _write(root, good, name, {"chat_template.jinja": f"{source}{name}"})
    config = json.loads((good / "adapter_config.json").read_text())
    config["modules_to_save"] = [f"a.module.of.name.{number}" for number in range(20_000)]
    _write(root, good, "many-saved", {"adapter_config.json": json.dumps(config)})


def add_sparse(root: Path, good: Path) -> None:
    """Add an adapter whose config has 1.5 GB, of which the disk holds nothing."""
    folder = _write(root.parent, good, "sparse", {})
    os.truncate(folder / "adapter_config.json", SPARSE_BYTES)
    folder.rename(root / "sparse")


def _write(root: Path, good: Path, name: str, files: dict[str, str]) -> Path:
    """Write an adapter with the weights of a good one, and some files of its own."""
    shutil.copytree(good, root / name)
    for file, text in files.items():
        (root / name / file).write_text(text)
    return root / name


def _nested(inner: dict[str, Any], depth: int) -> dict[str, Any]:
    for _ in range(depth):
        inner = {"type": "Sequence", "normalizers": [inner]}
    return inner
