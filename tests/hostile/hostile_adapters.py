"""Adapters whose texts or configs attack their readers. Their weights are valid."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from peft_adapters.texts.tokenizer_json import MAX_OWN_ADDED

SPARSE_BYTES = 1_500_000_000
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HUNGRY = "{% set ns = namespace(t='x' * 1000) %}{% for a in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}"

TEMPLATES = [f"endless-{number}" for number in range(3)] + [f"hungry-{number}" for number in range(2)]
TOKENIZERS = ("metaspace", "giant-id", "deep", "added")
"""All but the last have another tokenizer than the base; the last adds as many tokens as an adapter may."""

CONFIGS = ("sparse", "many-saved")
GOOD_FILES = ("adapter_config.json", "adapter_model.safetensors")


def write_all(root: Path, good: Path, model: Path) -> None:
    """Write every hostile adapter below `root`, with the weights of a valid one and texts based on its model's."""
    plain = json.loads((model / "tokenizer.json").read_text())
    changes: dict[str, dict[str, Any]] = {
        "metaspace": {"decoder": METASPACE, "pre_tokenizer": METASPACE},
        "giant-id": {"model": {**plain["model"], "vocab": {**plain["model"]["vocab"], "far": 4_000_000_000}}},
        "deep": {"normalizer": _nested({"type": "NFC"}, 90)},
        "added": {"added_tokens": [*plain["added_tokens"], *_many_tokens(MAX_OWN_ADDED - len(plain["added_tokens"]))]},
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
    """Add an adapter with a config of 1.5 GB, a sparse file."""
    folder = _write(root.parent, good, "sparse", {})
    os.truncate(folder / "adapter_config.json", SPARSE_BYTES)
    folder.rename(root / "sparse")


def _write(root: Path, good: Path, name: str, files: dict[str, str]) -> Path:
    """Write an adapter with the weights of a valid one, and additional files."""
    shutil.copytree(good, root / name)
    for file, text in files.items():
        (root / name / file).write_text(text)
    return root / name


def _many_tokens(num: int) -> list[dict[str, Any]]:
    """Return tokens with every flag that is expensive for the library: the letter of the prompts, and new texts."""
    flags = {"special": False, "single_word": False, "lstrip": True, "rstrip": True, "normalized": True}
    return [{"id": 0, "content": "a", **flags}] + [
        {"id": 0, "content": f"<|a {number}|>", **flags, "special": number % 2 == 0} for number in range(num - 1)
    ]


def _nested(inner: dict[str, Any], depth: int) -> dict[str, Any]:
    for _ in range(depth):
        inner = {"type": "Sequence", "normalizers": [inner]}
    return inner
