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


@dataclass(frozen=True, slots=True)
class Device:
    """The part of a GPU that decides grids and block sizes."""

    backend: Literal["cuda", "hip"]
    num_sms: int  # streaming multiprocessors, or compute units
    capability: int  # CUDA compute capability times ten; says nothing on HIP
    upcast: bool = False  # cast to fp32 after load: the interpreter's bf16 arithmetic is silently wrong


@dataclass(frozen=True, slots=True)
class Limits:
    """What the compiler may spend on a program."""

    num_warps: int = 4
    num_stages: int = 1  # loop iterations whose loads are under way at once
    max_registers: int = 0  # of a thread; 0: the compiler's choice

    def options(self) -> dict[str, int]:
        # Fusion is what Triton always did; from 3.9 on it warns where the choice is left open.
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        if self.max_registers:
            options["maxnreg"] = self.max_registers
        return options


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch: everything JITFunction needs, nothing run yet."""

    kernel: Any  # a @triton.jit function: a JITFunction, or its interpreted twin
    grid: tuple[int, int, int]
    args: dict[str, object]
    limits: Limits

    def __call__(self) -> None:
        self.kernel[self.grid](**self.args, **self.limits.options())


def device_of(tensor: Tensor) -> Device:
    """Describe the device a tensor lives on. A CPU tensor is served by Triton's interpreter."""
    if tensor.is_cuda:
        return _gpu(tensor.get_device())
    return Device(backend="cuda", num_sms=4, capability=80, upcast=True)


@cache
def _gpu(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(
        backend="hip" if torch.version.hip else "cuda",
        num_sms=properties.multi_processor_count,
        capability=properties.major * 10 + properties.minor,
    )


def pad_to_power_of_2(size: int, at_least: int = 1) -> int:
    return max(at_least, triton.next_power_of_2(size))
