"""Decoder layers under torch.compile: an option for models whose layers no shortcut replaces.

Linear layers with their adapters are one opaque operator, attention is another; a tensor, the handle, tells each call
which of the model's layers it computes. So a graph holds tensors only: no list of a step and no number of a layer is a
constant in it, all layers of a kind share one graph, and another mix of adapters does not compile again.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gpu_worker.layers.attention import LoopedAttention, PagedLayer, StepContext, bound_to
from gpu_worker.layers.lora import SharedInput
from gpu_worker.model.model import BaseModel
from lora_kernels import ops
from lora_kernels.cpu.build import cache_dir
from protocol.wire.errors import BadRequest

_owners: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""The sibling layers and attention layers that the operators run, by the number in their handles."""

_numbers = itertools.count()  # no number is used twice

_library = torch.library.Library("lorafleet_layers", "DEF")
_library.define("project(Tensor x, Tensor handle, SymInt[] sizes) -> Tensor[]")
_library.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor handle, float scale, float softcap, Tensor? sinks, SymInt width)"
    " -> Tensor"
)


def _project(x: Tensor, handle: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    outs: list[Tensor] = _owners[int(handle)].project(x)
    # The results of an operator must not share memory, as slices of one product do.
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
    """Return the tensor by which the operators find an owner. It is on the host: reading it waits for no device."""
    number = next(_numbers)
    _owners[number] = owner
    return torch.tensor(number)


class CompiledLayer:
    """A decoder layer's forward, compiled; in steps whose adapters have extras or LoRA on experts, as before."""

    def __init__(self, module: nn.Module, context: StepContext) -> None:
        self._context = context
        self._plain = module.forward
        self._compiled = torch.compile(module.forward, dynamic=True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer's own forward returns."""
        run = self._plain if self._context.extras or self._context.has_expert_rows else self._compiled
        return run(*args, **kwargs)


def install_compiled(
    model: nn.Module, layers: list[PagedLayer], shared: list[SharedInput], context: StepContext
) -> int:
    """Make the decoder layers of a model without shortcuts run compiled. Returns how many there are.

    Compiled code is kept on disk, beside the native kernels, for the next start.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "inductor"))
    for owner in (*shared, *layers):
        owner.handle = _handle(owner)
    found = decoder_layers(model)
    for module in found:
        compiled = CompiledLayer(module, context)
        module.forward = compiled.forward
    return len(found)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the members of module lists that call attention once each; of nested ones the outermost."""
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
def compile_errors() -> Iterator[None]:
    """Raise BadRequest where compiling fails: the next start would fail in the same way."""
    from torch._dynamo.exc import TorchDynamoException  # a worker that compiles nothing starts without the compiler

    try:
        yield
    except TorchDynamoException as error:
        first = str(error).strip().splitlines()[0]
        raise BadRequest(f"compile is on, but this model's layers cannot be compiled: {first}") from error


def warm(model: BaseModel) -> None:
    """Compile the graph of steps of one token before a request waits for it. Overwrites the first KV block."""
    one = np.ones(1, np.int64)
    model.context.attention = ops.build_attention_batch(one, one, np.zeros((1, 1), np.int32), model.device)
    ids = torch.zeros(1, dtype=torch.int64, device=model.device)
    with torch.inference_mode():
        model.forward(ids, model.context.attention.positions, ids)
