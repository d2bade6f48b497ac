"""Decoder layers under torch.compile: an option for models whose layers no shortcut replaces.

Linear layers with their adapters are one opaque operator, attention is another; a handle tensor identifies the layer
that a call computes. Since graphs hold only tensors, neither a step's lists nor a layer's number is a constant in them.
All layers of a kind share one graph, and another mix of adapters causes no recompilation.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import shutil
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gpu_worker.layers.attention import LoopedAttention, PagedLayer, StepContext, bound_to
from gpu_worker.layers.lora import SharedInput
from gpu_worker.model.model import BaseModel
from lora_kernels import ops
from lora_kernels.cpu.build import cache_dir
from protocol.runtime.file_locks import flush, lock_first
from protocol.runtime.private_files import private_folder
from protocol.wire.errors import BadRequest

logger = logging.getLogger(__name__)

_CACHE = "TORCHINDUCTOR_CACHE_DIR"

_owners: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""The sibling layers and attention layers that the operators run, by the number in their handle."""

_numbers = itertools.count()  # never reused

_library = torch.library.Library("lorafleet_layers", "DEF")
_library.define("project(Tensor x, Tensor handle, SymInt[] sizes) -> Tensor[]")
_library.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor handle, float scale, float softcap, Tensor? sinks, SymInt width)"
    " -> Tensor"
)


def _project(x: Tensor, handle: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    outs: list[Tensor] = _owners[int(handle)].project(x)
    # An operator's results must not share memory, as slices of one product do.
    return [out.clone() for out in outs] if len(outs) > 1 else outs


def _attend(
    q: Tensor, k: Tensor, v: Tensor, handle: Tensor, scale: float, softcap: float, sinks: Tensor | None, width: int
) -> Tensor:
    return _owners[int(handle)].attend(q, k, v, scale, softcap, sinks)


def _fake_project(x: Tensor, handle: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    return [x.new_empty(x.shape[0], size) for size in sizes]


def _fake_attend(q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], rest[-1])


for _name, _run, _fake in (("project", _project, _fake_project), ("attend", _attend, _fake_attend)):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lorafleet_layers::{_name}", _fake, lib=_library)


def _handle(owner: SharedInput | PagedLayer) -> Tensor:
    """Return the tensor that identifies an owner to the operators.

    It is on the host, so that reading it does not wait.
    """
    number = next(_numbers)
    _owners[number] = owner
    return torch.tensor(number)


class CompiledLayer:
    """A decoder layer with a compiled forward; runs uncompiled in steps with extras or LoRA on experts."""

    def __init__(self, module: nn.Module, context: StepContext) -> None:
        self._context = context
        self._plain = module.forward
        self._compiled = torch.compile(module.forward, dynamic=True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the result of the layer's own forward."""
        run = self._plain if self._context.extras or self._context.has_expert_rows else self._compiled
        return run(*args, **kwargs)


def install_compiled(
    model: nn.Module, layers: list[PagedLayer], shared: list[SharedInput], context: StepContext
) -> int:
    """Compile the decoder layers of a model without shortcuts, in the block of `compiling`. Return their number."""
    for owner in (*shared, *layers):
        owner.handle = _handle(owner)
    found = decoder_layers(model)
    for module in found:
        compiled = CompiledLayer(module, context)
        module.forward = compiled.forward
    return len(found)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the members of module lists that call attention exactly once; the outermost of nested ones."""
    found: list[nn.Module] = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        parent = model.get_submodule(name.rpartition(".")[0]) if name else None
        calls = [bound for part in module.modules() if (bound := bound_to(part)) is not None]
        if isinstance(parent, nn.ModuleList) and len(calls) == 1 and not isinstance(calls[0], LoopedAttention):
            found.append(module)
            inside = (*inside, f"{name}.")
    return found


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Let layers compile inside the block, into a cache for the next start.

    Raises BadRequest if compilation fails: the next start would fail in the same way.
    """
    from torch._dynamo.exc import TorchDynamoException  # workers that compile nothing start without the compiler
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # Transformers' import sets the variable to the compiler's default, a folder below /tmp. Another user could create
    # it first, and its files are executed. A folder of the operator's choice remains.
    default = os.path.abspath(default_cache_dir())
    is_chosen = os.environ.get(_CACHE, default) != default
    try:
        with contextlib.nullcontext() if is_chosen else _own_cache(cache_dir() / "inductor"):
            yield
    except TorchDynamoException as error:
        first = str(error).strip().splitlines()[0]
        raise BadRequest(f"compile is on, but this model's layers cannot be compiled: {first}") from error


@contextlib.contextmanager
def _own_cache(root: Path) -> Iterator[None]:
    """Let the compiler use a folder in which no compilation was interrupted, and which no other process uses.

    It writes its files in place: killed meanwhile, it leaves the beginning of a file, which every later start would
    load. So an unfinished folder is emptied. root: holds a folder for each process on this machine that compiles.
    """
    folder = _locked(root)
    unfinished = folder.with_suffix(".unfinished")
    if unfinished.exists():
        logger.warning("compiling again: %s is from a process that ended meanwhile", folder)
        shutil.rmtree(folder, ignore_errors=True)
    unfinished.touch()
    private_folder(folder)
    os.environ[_CACHE] = str(folder)
    yield
    for path in (*folder.rglob("*"), folder):  # what the disk has not got when power fails would be lost
        flush(path)
    unfinished.unlink()


@functools.cache
def _locked(root: Path) -> Path:
    """Return the first folder that no other process has locked. The lock ends with this process."""
    private_folder(root)
    lock = lock_first(root / f"{number}.lock" for number in itertools.count())
    assert lock is not None  # there is always a next number
    return lock.with_suffix("")


def warm(model: BaseModel) -> None:
    """Compile the graph of one-token steps before the first request. Overwrites the first KV block."""
    one = np.ones(1, np.int64)
    model.context.attention = ops.build_attention_batch(one, one, np.zeros((1, 1), np.int32), model.device)
    ids = torch.zeros(1, dtype=torch.int64, device=model.device)
    with torch.inference_mode():
        model.forward(ids, model.context.attention.positions, ids)
