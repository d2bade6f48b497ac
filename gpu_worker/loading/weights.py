"""What tells the weights of two models of one architecture apart: a hash of numbers sampled from their files.

It is the same for a model in one file or in shards, in any folder. Reading all of a model would take as long as loading
it again: of each tensor 4 KiB are read in every MiB and at the end, and small tensors whole. Training changes all of a
tensor's numbers. A copy in which only a few rows were changed, between two samples, has the same hash.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from protocol.runtime.model_files import GGUF_LINK

SAMPLE, STRIDE = 4 << 10, 1 << 20
"""Bytes of a sample, and from the beginning of one to that of the next."""

SMALL = 64 << 10
"""Bytes up to which a tensor is read whole."""

Part = tuple[str, int, int]
"""A tensor's name, dtype and shape as text, and where its bytes begin and end in its file."""


def weights_hash(folder: Path) -> str:
    """Return a hash (sha256, hex) of the weights in a model's folder, "" if it has no file of weights that is known.

    The files are those that a loader has read without complaint. Raises OSError.
    """
    hashes: list[tuple[str, str]] = []
    if (folder / GGUF_LINK).is_file():
        size = (folder / GGUF_LINK).stat().st_size
        hashes += _hashes(folder / GGUF_LINK, [(GGUF_LINK, 0, size)])
    else:
        for file in sorted(folder.glob("*.safetensors")):
            hashes += _hashes(file, _tensors(file))
    text = json.dumps(sorted(hashes)).encode()
    return hashlib.sha256(text).hexdigest() if hashes else ""


def _tensors(file: Path) -> Iterator[Part]:
    """Make the tensors of a safetensors file."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            yield json.dumps([name, entry["dtype"], entry["shape"]]), 8 + size + begin, 8 + size + end


def _hashes(file: Path, parts: Iterator[Part] | list[Part]) -> Iterator[tuple[str, str]]:
    """Make each part's text and the hash of its samples."""
    with file.open("rb") as opened:
        for text, begin, end in parts:
            found = hashlib.sha256()
            if end - begin <= SMALL:
                found.update(os.pread(opened.fileno(), end - begin, begin))
            else:
                for at in (*range(begin, end - SAMPLE, STRIDE), end - SAMPLE):
                    found.update(os.pread(opened.fileno(), SAMPLE, at))
            yield text, found.hexdigest()
