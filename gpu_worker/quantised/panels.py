"""Packed weights stored in a quantized folder: later starts map them, and workers of one machine share them.

Packing takes longer than everything else done to a quantized weight. The files are named by the kernels that packed
them and by their weights file; others are packed again and replace them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import tempfile
from pathlib import Path

import msgspec
import torch

from gpu_worker.quantised.index import ALIGNMENT
from lora_kernels import ops
from lora_kernels.cpu.build import COMMON_FLAGS, fingerprint

logger = logging.getLogger(__name__)

PANELS = "panels-"
"""Prefix of the names of files with packed weights."""


class Panels(msgspec.Struct, frozen=True):
    """The place of a packed weight in its file."""

    offset: int  # byte offset
    shape: tuple[int, int]  # uint8
    form: int
    kind: str
    size: tuple[int, int]  # the weight's shape


class KeptPanels:
    """The packed weights of a folder. As a context manager, it stores newly packed weights on exit."""

    def __init__(self, folder: Path, weights: Path) -> None:
        """weights: the file that they are packed from."""
        state = weights.stat()
        made_of = fingerprint(platform.machine(), COMMON_FLAGS), state.st_size, state.st_mtime_ns
        key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]
        self._folder, self._name = folder, f"{PANELS}{key}"
        self._found: dict[str, Panels] = {}
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._new: dict[str, tuple[ops.QuantisedWeight, ops.QuantisedLinear]] = {}
        try:
            found = msgspec.json.decode((folder / f"{self._name}.json").read_bytes(), type=dict[str, Panels])
            path = folder / f"{self._name}.bin"
            size = path.stat().st_size
            self._memory = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
            self._found = {name: one for name, one in found.items() if one.offset + one.shape[0] * one.shape[1] <= size}
        except FileNotFoundError:
            pass
        except (OSError, msgspec.DecodeError, RuntimeError) as error:
            logger.warning("the packed weights in %s cannot be read and are rebuilt: %s", folder, error)

    def pack(self, name: str, weight: ops.QuantisedWeight, impl: ops.Impl | None) -> ops.QuantisedLinear:
        """Return a layer's weight in the layout of `ops.pack_quantised`, memory-mapped if it was stored."""
        kept = self._found.get(name)
        if impl is None and kept is not None and (kept.kind, kept.size) == (weight.kind, _size(weight)):
            num_bytes = kept.shape[0] * kept.shape[1]
            panels = self._memory[kept.offset : kept.offset + num_bytes].view(kept.shape)
            return ops.QuantisedLinear([], [panels], [kept.form], [weight.out_features], weight.in_features)
        made = ops.pack_quantised([weight], impl=impl)
        if impl is None and made.panels:  # the reference packs nothing
            self._new[name] = weight, made
        return made

    def __enter__(self) -> KeptPanels:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Replace the stored panels with newly packed ones, atomically; does nothing if loading the model failed."""
        if kind is not None or not self._new:
            return
        try:
            self._write()
        except OSError as problem:
            logger.warning(
                "packed weights cannot be stored in %s, so every start packs them: %s", self._folder, problem
            )

    def _write(self) -> None:
        index: dict[str, Panels] = {}
        with tempfile.TemporaryDirectory(dir=self._folder) as scratch:
            part = Path(scratch) / self._name
            with part.open("wb") as out:
                for name, (weight, made) in self._new.items():
                    out.seek(-(-out.tell() // ALIGNMENT) * ALIGNMENT)
                    (panels,), (form,) = made.panels, made.forms
                    shape = (panels.shape[0], panels.shape[1])
                    index[name] = Panels(out.tell(), shape, form, weight.kind, _size(weight))
                    panels.numpy().tofile(out)
            for path in self._folder.glob(f"{PANELS}*"):  # existing mappings of a deleted file stay valid
                path.unlink()
            os.replace(part, self._folder / f"{self._name}.bin")
            part.write_bytes(msgspec.json.encode(index))
            os.replace(part, self._folder / f"{self._name}.json")


def _size(weight: ops.QuantisedWeight) -> tuple[int, int]:
    return weight.out_features, weight.in_features
