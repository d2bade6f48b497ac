"""Conversion of adapters of MLX-LM and llama.cpp to PEFT's files, by a store at the fetch, or by hand."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

from peft_adapters.format import CONFIG_FILE, MAX_CONFIG_BYTES, WEIGHTS_FILE, parse_config, parse_header
from peft_adapters.formats.conversion import Conversion
from peft_adapters.formats.gguf import GGUF_END, convert_gguf
from peft_adapters.formats.gguf_header import parse_gguf
from peft_adapters.formats.mlx import MLX_WEIGHTS, convert_mlx
from peft_adapters.safetensors_header import MAX_HEADER_BYTES
from protocol.runtime.free_space import Reserve
from protocol.wire.errors import AdapterRefused
from protocol.wire.messages import ServedModel

HEAD_BYTES = 8 + MAX_HEADER_BYTES
"""Bytes at the beginning of a weights file that include its whole header."""


def plan_conversion(folder: Path, weights: str, num_bytes: int, base: ServedModel | None) -> Conversion | None:
    """Return the plan to convert the adapter in a folder; None if PEFT saved it.

    weights: name of its weights file, of which the first HEAD_BYTES are enough. num_bytes: size of the whole file.
    Raises AdapterRefused, also for GGUF without a base.
    """
    if weights == WEIGHTS_FILE:
        return None
    with (folder / weights).open("rb") as file:
        head = file.read(HEAD_BYTES)
    if weights == MLX_WEIGHTS:
        with (folder / CONFIG_FILE).open("rb") as file:
            config = parse_config(file.read(MAX_CONFIG_BYTES + 1))
        return convert_mlx(config, parse_header(head, num_bytes))
    if base is None:
        raise AdapterRefused([f"{weights} can be read for a base model only: the heads of its q and k are the base's"])
    return convert_gguf(parse_gguf(head, num_bytes), base)


def convert(folder: Path, weights: str, conversion: Conversion, target: Path, reserve: Reserve | None = None) -> None:
    """Write a planned conversion of a folder's weights file into `target`, perhaps the same folder.

    reserve: free-space reserve of the target's disk; None: nothing is reserved. Raises OSError, NoRoom.
    """
    with (
        (folder / weights).open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view,
        memoryview(view) as source,
        (target / WEIGHTS_FILE).open("wb") as out,
    ):
        for piece in conversion.weights(source):
            if reserve is not None:
                reserve.check(target, len(piece))
            out.write(piece)
    (target / CONFIG_FILE).write_text(json.dumps(conversion.config))


def depends_on_base(weights: str) -> bool:
    """Return whether the conversion of a weights file depends on the base model."""
    return weights.endswith(GGUF_END)
