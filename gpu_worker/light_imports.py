"""Imports torch and transformers without what a worker on a CPU never calls, which is most of the time that they take.

Transformers imports torch's compiler, its distributed tensors and accelerate, whether a model needs them or not, and
reads the sources of all its models to learn what is where. A model that is neither compiled nor quantised by a library
needs none of the former, and what the latter finds is kept. Torch imports parts that only its compiler and training
need; they are imported late, on first use.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.machinery
import inspect
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
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
"""Packages that transformers asks for, answered as missing."""

META_KERNELS = "torch._meta_registrations"
"""Shapes of results on no device, written in Python. Torch has most of them in C++."""

MADE_WITHOUT = {"gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3", "smollm3"}
"""Types of models that are made on no device without META_KERNELS."""

LATE = {META_KERNELS, "torch.export", "torch.fx.passes", "torch.masked", "torch.nested"}
"""Modules that torch imports with itself, deferred here: a quarter of its import time."""

USED = ("modeling_utils", "masking_utils", "models.auto.modeling_auto")


def import_transformers(settings: Settings) -> None:
    """Import what a worker needs of transformers, unless its model may need all of it: then nothing is imported yet."""
    if "transformers" in sys.modules or settings.compile or not is_plain(settings):
        load_late(META_KERNELS)
        return
    import_torch()
    import torch

    has_gpu = settings.device != "cpu" and torch.cuda.is_available()
    if has_gpu or _config(settings).get("model_type") not in MADE_WITHOUT:
        load_late(META_KERNELS)
    if has_gpu or COMPILER in sys.modules:
        return
    try:
        with _without_compiler():
            _answer_and_keep(_questions())
            for module in USED:
                importlib.import_module(f"transformers.{module}")
    except (ImportError, AttributeError) as error:  # another version than those that this was written for
        logger.warning("transformers is imported in full, which takes two more seconds: %s", error)
        load_late(META_KERNELS)
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
            del sys.modules[name]


def is_plain(settings: Settings) -> bool:
    """Return whether the model's config can be read, and names no library that has quantised it."""
    config = _config(settings)
    parts = [config, *config.values()]
    return bool(config) and not any(isinstance(part, dict) and "quantization_config" in part for part in parts)


def _config(settings: Settings) -> dict[str, Any]:
    """Return the model's config.json; empty where it cannot be read: loading the model reports the error."""
    try:
        config = json.loads((model_folder(settings.model, WEIGHT_FILES) / "config.json").read_text())
    except (OSError, ValueError, LorafleetError):
        return {}
    return config if isinstance(config, dict) else {}


# ---------------------------------------------------------------- parts of torch that are imported late


class _Late(ModuleType):
    """Lazy module: executes on the first access to a missing attribute."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":  # Python looks these up on every module
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        load_late(self.__name__)
        return getattr(self, name)


class _LateLoader(importlib.machinery.SourceFileLoader):
    """Makes a module whose code runs later."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Late(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = self.path


class _LateFinder:
    """Import finder for the modules of LATE; before the compiler it imports the kernels that it needs."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name in (COMPILER, "torch._inductor"):
            load_late(META_KERNELS)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if name in LATE else None
        if spec is not None and spec.origin is not None:
            spec.loader = _LateLoader(name, spec.origin)
        return spec


def load_late(name: str) -> None:
    """Run the code of a module that was to run later, unless it has run. Nobody asks META_KERNELS for anything."""
    module: Any = sys.modules.get(name)
    if type(module).__name__ == _Late.__name__:
        module.__class__ = ModuleType
        loader = importlib.machinery.SourceFileLoader(name, module.__file__)
        module.__spec__.loader = module.__loader__ = loader
        loader.exec_module(module)


def import_torch() -> None:
    """Import torch with the modules of LATE deferred, unless it is imported already."""
    if "torch" in sys.modules:
        return
    sys.meta_path.insert(0, _LateFinder())
    with describing_briefly():
        import torch
    if hasattr(torch._C, "_set_generator_metaclass"):  # no generator can be made without it; META_KERNELS set it else
        opaque = importlib.import_module("torch._opaque_base")
        torch._C._set_generator_metaclass(opaque.OpaqueBaseMeta)


@contextmanager
def describing_briefly() -> Iterator[None]:
    """Let frames be described by what they say themselves within the block, which defines operators of torch.

    Torch notes in what module, file and line each is defined. Python would look for the files of all modules that there
    are, for lines of context around these and to find the module.
    """
    getframeinfo, getmodule = inspect.getframeinfo, inspect.getmodule

    def module_of(described: Any, _filename: str | None = None) -> ModuleType | None:
        if inspect.isframe(described):
            return sys.modules.get(described.f_globals.get("__name__", ""))
        return getmodule(described, _filename)

    inspect.getframeinfo, inspect.getmodule = functools.partial(getframeinfo, context=0), module_of
    try:
        yield
    finally:
        inspect.getframeinfo, inspect.getmodule = getframeinfo, getmodule


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
                logger.warning("%s cannot be read and is rebuilt: %s", kept, error)
        found = read(path)
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as part:
                part.write(msgspec.json.encode(packed(found)))
            os.replace(part.name, kept)
        except OSError as error:
            logger.info("the index of transformers cannot be stored: %s", error)
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
