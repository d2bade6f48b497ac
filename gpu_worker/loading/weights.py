"""A hash that distinguishes the weights of two models of one architecture, from samples of their files.

It does not depend on sharding or on the folder. Reading a whole model would take as long as loading it again, so 4 KiB
are read per MiB of each tensor and at its end, and small tensors completely. Training changes all numbers of a tensor;
a copy that differs only in a few rows between two samples has the same hash.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from protocol.runtime.model_files import GGUF_LINK
from protocol.wire.errors import BadRequest

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

SAMPLE, STRIDE = 4 << 10, 1 << 20
"""Bytes per sample, and between the beginnings of two samples."""

SMALL = 64 << 10
"""Maximum bytes of a tensor that is read completely."""

MAX_HEADER_BYTES = 100_000_000
"""Maximum bytes of a safetensors header; the readers of weights have the same limit."""

Part = tuple[str, int, int]
"""A tensor's name, dtype and shape as text, and the begin and end of its bytes in the file."""


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors of a model's folder: those in its index, or else the single default file.

    The folder may hold others, such as the same weights in another format. Raises OSError, ValueError.
    """
    names = [WEIGHTS]
    if (folder / INDEX).is_file():
        names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    return [folder / name for name in names]


def weights_hash(folder: Path) -> str:
    """Return a hash (SHA-256, hex) of the weights in a model's folder, "" if it has no known weights file.

    Raises BadRequest for a file that cannot be read.
    """
    hashes: list[tuple[str, str]] = []
    path = folder / GGUF_LINK
    try:
        if path.is_file():
            hashes += _hashes(path, [(GGUF_LINK, 0, path.stat().st_size)])
        else:
            for path in weight_files(folder):
                if not path.is_file():
                    return ""
                hashes += _hashes(path, _tensors(path))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadRequest(f"{path} cannot be read as weights: {error!r:.200}") from error
    text = json.dumps(sorted(hashes)).encode()
    return hashlib.sha256(text).hexdigest() if hashes else ""


def _tensors(file: Path) -> Iterator[Part]:
    """Yield the tensors of a safetensors file. Raises ValueError and others for an invalid file."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"its header would have {size} bytes; the limit is {MAX_HEADER_BYTES}")
        header = json.loads(opened.read(size))
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            yield json.dumps([name, entry["dtype"], entry["shape"]]), 8 + size + begin, 8 + size + end


def _hashes(file: Path, parts: Iterator[Part] | list[Part]) -> Iterator[tuple[str, str]]:
    """Yield each part's text and the hash of its samples."""
    with file.open("rb") as opened:
        for text, begin, end in parts:
            found = hashlib.sha256()
            if end - begin <= SMALL:
                found.update(os.pread(opened.fileno(), end - begin, begin))
            else:
                for at in (*range(begin, end - SAMPLE, STRIDE), end - SAMPLE):
                    found.update(os.pread(opened.fileno(), SAMPLE, at))
            yield text, found.hexdigest()
