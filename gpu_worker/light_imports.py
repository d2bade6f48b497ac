"""Imports transformers without the parts that a CPU worker never calls, which take most of the import time.

Transformers imports torch's compiler, its distributed tensors and accelerate unconditionally. A model that is neither
compiled nor quantized by a library needs none of them.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from protocol.runtime.model_files import WEIGHT_FILES, model_folder
from protocol.runtime.settings import Settings
from protocol.wire.errors import LorafleetError

logger = logging.getLogger(__name__)

COMPILER = "torch._dynamo"
MASKS = f"{COMPILER}._trace_wrapped_higher_order_op"
"""The only module of the compiler that transformers itself needs: it is for masks."""

MISSING = ("is_accelerate_available", "is_torch_distributed_available", "is_kernels_available")
"""Transformers' availability checks that are made to return False."""

USED = ("modeling_utils", "masking_utils", "models.auto.modeling_auto")


def import_transformers(settings: Settings) -> None:
    """Import the parts of transformers that a worker needs; do nothing if its model may need the whole library."""
    if "transformers" in sys.modules or settings.compile or not is_plain(settings):
        return
    import torch

    if COMPILER in sys.modules or (settings.device != "cpu" and torch.cuda.is_available()):
        return
    try:
        with _without_compiler():
            _answer(_questions())
            for module in USED:
                importlib.import_module(f"transformers.{module}")
    except (ImportError, AttributeError) as error:  # another version of transformers
        logger.warning("all of transformers is imported, which takes two seconds longer: %s", error)
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
            del sys.modules[name]


def is_plain(settings: Settings) -> bool:
    """Return whether the model's config can be read and names no quantization library."""
    try:
        config = json.loads((model_folder(settings.model, WEIGHT_FILES) / "config.json").read_text())
    except (OSError, ValueError, LorafleetError):
        return False  # loading the model will report the error
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
    """Stand in for a decorator that marks functions for the compiler, which never sees them."""
    return function or _mark


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Keep torch's compiler from being imported inside the block. It can be imported normally afterwards."""
    import torch

    marks: Any = _StandIn(COMPILER, allow_in_graph=_mark, assume_constant_result=_mark, disable=_mark)
    sys.modules[COMPILER] = torch._dynamo = marks
    try:
        importlib.import_module(MASKS)
        yield
    finally:
        del sys.modules[COMPILER], torch._dynamo


def _questions() -> Any:
    """Return transformers' module of package checks, imported before transformers itself makes any."""
    sys.modules["transformers"] = _StandIn("transformers", __version__=version("transformers"))
    try:
        return importlib.import_module("transformers.utils.import_utils")
    finally:
        del sys.modules["transformers"]


def _answer(questions: Any) -> None:
    """Make transformers treat the packages in MISSING as not installed."""
    import torch

    find, is_available = questions._is_package_available, torch.distributed.is_available
    questions._is_package_available, torch.distributed.is_available = (lambda *_, **__: (False, "N/A")), lambda: False
    try:
        for name in MISSING:
            question = getattr(questions, name)
            question.cache_clear()
            question()  # the result is cached
    finally:
        questions._is_package_available, torch.distributed.is_available = find, is_available
    # Transformers asks twice for the import structure of all its models, and reads their sources each time.
    questions.create_import_structure_from_path = functools.cache(questions.create_import_structure_from_path)


@contextmanager
def drawing_nothing_on_meta() -> Iterator[None]:
    """Leave meta parameters uninitialized inside the block: torch would import its compiler to fill them."""
    import torch

    def draw(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if self.is_meta else super(torch.Tensor, self).normal_(*args, **kwargs)

    torch.Tensor.normal_ = draw
    try:
        yield
    finally:
        del torch.Tensor.normal_


def state_of(folder: Path) -> str:
    """Hash the paths, sizes and modification times of the `.py` files in a folder and its subfolders."""
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
