"""Imports transformers without what a worker on a CPU never calls, which is most of the time that it takes.

Transformers imports torch's compiler, its distributed tensors and accelerate, whether a model needs them or not, and
reads the sources of all its models to learn what is where. A model that is neither compiled nor quantised by a library
needs none of the former, and what the latter finds is kept.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.machinery
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from protocol.runtime.model_files import WEIGHT_FILES, cache_folder, model_folder
from protocol.runtime.private_files import is_own
from protocol.runtime.settings import Settings
from protocol.wire.errors import LorafleetError

logger = logging.getLogger(__name__)

COMPILER = "torch._dynamo"
MASKS = f"{COMPILER}._trace_wrapped_higher_order_op"
"""The one module of the compiler that transformers uses by itself, for masks."""

MISSING = ("is_accelerate_available", "is_torch_distributed_available", "is_kernels_available")
"""What transformers asks about packages, and is told no."""

USED = ("modeling_utils", "masking_utils", "models.auto.modeling_auto")


def import_transformers(settings: Settings) -> None:
    """Import what a worker needs of transformers, unless its model may need all of it: then nothing is imported yet."""
    if "transformers" in sys.modules or settings.compile or not is_plain(settings):
        return
    import torch

    if COMPILER in sys.modules or (settings.device != "cpu" and torch.cuda.is_available()):
        return
    try:
        with _without_compiler():
            _answer_and_keep(_questions())
            for module in USED:
                importlib.import_module(f"transformers.{module}")
    except (ImportError, AttributeError) as error:  # another version than those that this was written for
        logger.warning("transformers is imported whole, which takes two seconds more: %s", error)
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
            del sys.modules[name]


def is_plain(settings: Settings) -> bool:
    """Return whether the model's config can be read, and names no library that has quantised it."""
    try:
        config = json.loads((model_folder(settings.model, WEIGHT_FILES) / "config.json").read_text())
    except (OSError, ValueError, LorafleetError):
        return False  # loading the model says what is wrong
    if not isinstance(config, dict) or not config:
        return False
    return not any(isinstance(part, dict) and "quantization_config" in part for part in (config, *config.values()))


# ---------------------------------------------------------------- stand-ins


class _StandIn(ModuleType):
    """A package whose modules can be imported, but whose own code has not run."""

    def __init__(self, name: str, **attributes: object) -> None:
        super().__init__(name)
        parent = name.rpartition(".")[0]
        spec = importlib.machinery.PathFinder.find_spec(name, sys.modules[parent].__path__ if parent else None)
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError(f"{name} is no package")
        self.__spec__, self.__path__ = spec, list(spec.submodule_search_locations)
        self.__dict__.update(attributes)


def _mark(function: Callable[..., Any] | None = None, *_: object, **__: object) -> Callable[..., Any]:
    """Stand for a mark that tells the compiler of a function, which it will never see."""
    return function or _mark


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Keep torch's compiler from being imported meanwhile. Afterwards it can be, as ever."""
    import torch

    marks: Any = _StandIn(COMPILER, allow_in_graph=_mark, assume_constant_result=_mark, disable=_mark)
    sys.modules[COMPILER] = torch._dynamo = marks
    try:
        importlib.import_module(MASKS)
        yield
    finally:
        del sys.modules[COMPILER], torch._dynamo


def _questions() -> Any:
    """Return transformers' module of questions about packages, imported before transformers asks any of them."""
    sys.modules["transformers"] = _StandIn("transformers", __version__=version("transformers"))
    try:
        return importlib.import_module("transformers.utils.import_utils")
    finally:
        del sys.modules["transformers"]


def _answer_and_keep(questions: Any) -> None:
    """Let transformers find none of the packages in MISSING, and keep what it finds in the sources of its models."""
    import torch

    find, is_available = questions._is_package_available, torch.distributed.is_available
    questions._is_package_available, torch.distributed.is_available = (lambda *_, **__: (False, "N/A")), lambda: False
    try:
        for name in MISSING:
            question = getattr(questions, name)
            question.cache_clear()
            question()  # the answer is kept, and given ever after
    finally:
        questions._is_package_available, torch.distributed.is_available = find, is_available
    questions.create_import_structure_from_path = functools.cache(_kept(questions.create_import_structure_from_path))


@contextmanager
def drawing_nothing_on_meta() -> Iterator[None]:
    """Give parameters on no device no random values meanwhile: torch would import its compiler to give them none."""
    import torch

    def draw(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if self.is_meta else super(torch.Tensor, self).normal_(*args, **kwargs)

    torch.Tensor.normal_ = draw
    try:
        yield
    finally:
        del torch.Tensor.normal_


# ---------------------------------------------------------------- what is in the sources


def _kept(read: Callable[[str | Path], Any]) -> Callable[[str | Path], Any]:
    """Return a function that reads sources as `read` does, but those of all models only once as long as none changes.

    They are known by the paths, sizes and times of all files. What was read is kept beside the native kernels.
    """
    state = functools.cache(state_of)  # transformers asks twice

    def read_once(path: str | Path) -> Any:
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        if folder.name != "models":  # one of its folders, by which `read` calls itself
            return read(path)
        kept = cache_folder() / f"transformers-{state(folder)}.json"
        if is_own(kept):
            try:
                return unpacked(msgspec.json.decode(kept.read_bytes()))
            except (OSError, msgspec.DecodeError, ValueError, TypeError) as error:
                logger.warning("%s cannot be read, and is made again: %s", kept, error)
        found = read(path)
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as part:
                part.write(msgspec.json.encode(packed(found)))
            os.replace(part.name, kept)
        except OSError as error:
            logger.info("what transformers consists of cannot be kept: %s", error)
        return found

    return read_once


def packed(found: Any) -> Any:
    """Return nested dicts, sets and strings as what JSON can hold: lists that begin with their kind."""
    if isinstance(found, Mapping):
        return ["dict", *([packed(key), packed(value)] for key, value in found.items())]
    if isinstance(found, (frozenset, set)):
        return ["frozenset" if isinstance(found, frozenset) else "set", *sorted(found)]
    if not isinstance(found, str):
        raise TypeError(f"{type(found).__name__} is not kept")
    return found


def unpacked(found: Any) -> Any:
    """Return what `packed` was given. Raises ValueError, TypeError for anything else."""
    if isinstance(found, str):
        return found
    kind, *entries = found
    if kind == "dict":
        return {unpacked(key): unpacked(value) for key, value in entries}
    if kind not in ("set", "frozenset") or not all(isinstance(entry, str) for entry in entries):
        raise ValueError(f"no set of strings: {str(found)[:100]}")
    return frozenset(entries) if kind == "frozenset" else set(entries)


def state_of(folder: Path) -> str:
    """Hash the paths, sizes and times of change of a folder's files and of those in the folders in it."""
    digest, folders = hashlib.sha256(), [os.fspath(folder)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_dir():
                    folders.append(entry.path)
                elif entry.name.endswith(".py"):
                    state = entry.stat()
                    digest.update(f"{entry.path}\0{state.st_size}\0{state.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:24]
