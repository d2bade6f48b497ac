"""Substitutes for CUDA graphs on a CPU, which check that a recorded step follows the same rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpu_worker.cuda.graphs import Replay, Unrecordable

WAITS = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::nonzero",
    "aten::is_nonzero",
    "aten::equal",
    "aten::masked_select",
}


class Rerun:
    """Replays by calling the step again: inputs must be changed in place, but Python code runs."""

    def __init__(self) -> None:
        self.num_replays: list[int] = []  # per recording

    def record(self, step: Callable[[], object]) -> Replay:
        step()
        return self.counted(step)

    def counted(self, replay: Replay) -> Replay:
        index = len(self.num_replays)
        self.num_replays.append(0)

        def count() -> None:
            self.num_replays[index] += 1
            replay()

        return count


class Tape(Rerun):
    """Replays the operators of the first run on the same tensors: without Python, new memory, or other sizes."""

    def record(self, step: Callable[[], object]) -> Replay:
        with Recording() as recording:
            step()
        return self.counted(recording.replay)


class Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().split(".")[0] in WAITS:
            raise Unrecordable(f"{func.name()} reads from the device")
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, tensors(out)))
        return out

    def replay(self) -> None:
        with torch.inference_mode():
            for func, args, kwargs, outs in self._calls:
                for out, again in zip(outs, tensors(func(*args, **kwargs)), strict=True):
                    if again.data_ptr() != out.data_ptr():  # neither a view nor an in-place operation
                        out.copy_(again)


def tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]
