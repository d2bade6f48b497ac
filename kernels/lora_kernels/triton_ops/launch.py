"""What a kernel launch is before it runs, and what it must know of the device.

Operations plan their launches and then run them, so that the ahead-of-time report compiles exactly what a GPU would
be asked to run (it plans with tensors on the meta device).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction


@dataclass(frozen=True, slots=True)
class Device:
    """The part of a GPU that decides grids and block sizes."""

    backend: Literal["cuda", "hip"]
    num_sms: int  # streaming multiprocessors, or compute units
    upcast: bool = False  # cast to fp32 after load: the interpreter's bf16 arithmetic is silently wrong


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch: everything JITFunction needs, nothing run yet."""

    kernel: Any  # a @triton.jit function: a JITFunction, or its interpreted twin
    grid: tuple[int, int, int]
    args: dict[str, object]
    num_warps: int
    num_stages: int

    def __call__(self) -> None:
        # Fusion is what Triton always did; from 3.9 on it warns where the choice is left open.
        self.kernel[self.grid](**self.args, num_warps=self.num_warps, num_stages=self.num_stages, enable_fp_fusion=True)


def device_of(tensor: Tensor) -> Device:
    """Describe the device a tensor lives on. A CPU tensor is served by Triton's interpreter."""
    if tensor.is_cuda:
        return _gpu(tensor.get_device())
    return Device(backend="cuda", num_sms=4, upcast=True)


@cache
def _gpu(index: int) -> Device:
    backend = "hip" if torch.version.hip else "cuda"
    return Device(backend=backend, num_sms=torch.cuda.get_device_properties(index).multi_processor_count)


def is_interpreted(kernel: object) -> bool:
    """True when TRITON_INTERPRET was set as the kernel was defined."""
    return isinstance(kernel, InterpretedFunction)


def is_capturing(tensor: Tensor) -> bool:
    """True while a graph is recorded: this step's counts are then no guide to the steps that will replay it."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def pad_to_power_of_2(size: int, at_least: int = 1) -> int:
    return max(at_least, triton.next_power_of_2(size))
