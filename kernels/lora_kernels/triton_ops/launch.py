"""A kernel launch before it runs, and the properties of a device on which launches depend.

Operations first plan launches and then run them, so that the ahead-of-time report, which plans with tensors on the meta
device, compiles exactly what a GPU would run.
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
    """The properties of a GPU that determine grids and block sizes."""

    backend: Literal["cuda", "hip"]
    num_sms: int  # streaming multiprocessors, or compute units
    capability: int  # CUDA compute capability times ten; unused on HIP
    upcast: bool = False  # whether to cast to fp32 after loads: the interpreter's bf16 arithmetic is wrong


@dataclass(frozen=True, slots=True)
class Limits:
    """The resources that the compiler may use for a program."""

    num_warps: int = 4
    num_stages: int = 1  # loop iterations whose loads may be in flight at once
    max_registers: int = 0  # per thread; 0: the compiler's choice

    def options(self) -> dict[str, int]:
        """Return the limits as keyword arguments of a launch."""
        # Triton has always fused products and sums; from 3.9 it warns unless this is explicit.
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        if self.max_registers:
            options["maxnreg"] = self.max_registers
        return options


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch with all arguments; calling it runs it."""

    kernel: Any  # a @triton.jit function: a JITFunction, or its interpreted twin
    grid: tuple[int, int, int]
    args: dict[str, object]
    limits: Limits

    def __call__(self) -> None:
        """Launch the kernel."""
        self.kernel[self.grid](**self.args, **self.limits.options())


def device_of(tensor: Tensor) -> Device:
    """Return the properties of a tensor's device. CPU tensors run in Triton's interpreter."""
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


def require_rows(*tensors: Tensor, same_dtype: bool = True) -> None:
    """Raise ValueError unless each tensor's rows are contiguous, and all have one dtype.

    Kernels are only given the other strides. same_dtype: False if a kernel converts.
    """
    for tensor in tensors:
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"a tensor of shape {tuple(tensor.shape)} has strides {tensor.stride()}: the last must be 1"
            )
        if same_dtype and tensor.dtype != tensors[0].dtype:
            raise ValueError(f"tensors of {tensors[0].dtype} and {tensor.dtype} cannot be computed with together")


def pad_to_power_of_2(size: int, at_least: int = 1) -> int:
    """Return the smallest power of two that is at least `size` and at least `at_least`."""
    return max(at_least, triton.next_power_of_2(size))
