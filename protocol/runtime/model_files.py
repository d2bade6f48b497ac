"""The base model's files: a local folder, or a download from the Hub of those files that a service reads."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]

from protocol.wire.errors import BadRequest

TOKENIZER_FILES = ("*.json", "*.jinja")
"""Patterns of what the gateway needs: tokenizer, chat template, configs."""

WEIGHT_FILES = (*TOKENIZER_FILES, "*.safetensors", "*.model")


def model_folder(model: str, patterns: tuple[str, ...]) -> Path:
    """Return the folder of `model`, a path or a Hub id (fetched if needed). Raises BadRequest when it is neither."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadRequest(f"{path} holds no config.json: it is not a model folder")
        return path
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise BadRequest(f"{model!r} is neither a folder nor a Hub id of the form org/name")
    return Path(snapshot_download(model, allow_patterns=list(patterns)))


def served_name(model: str, name: str) -> str:
    """Return the base model's name in the API: `name` if given, else the Hub id or the folder's name."""
    if name:
        return name
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model
