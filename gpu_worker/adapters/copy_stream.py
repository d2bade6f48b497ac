"""The CUDA stream on which adapters are copied to the device beside the steps on the default stream."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor


class CopyStream:
    """One device's stream for copies. Used by one thread at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def allocate_like(self, tensor: Tensor) -> Tensor:
        """Return an empty tensor of the same shape and dtype on the device.

        Its memory comes from the default stream, whose steps will read it. Freed before the copy has ended, it is not
        given out again until then.
        """
        allocated = torch.empty_like(tensor, device=self._device)
        allocated.record_stream(self._stream)
        return allocated

    def wait_for_steps(self) -> None:
        """Make what is launched here from now on wait for what the default stream has been given until now."""
        self._stream.wait_stream(torch.cuda.default_stream(self._device))

    def use(self) -> AbstractContextManager[object]:
        """Return a context in which the calling thread launches on this stream."""
        return torch.cuda.stream(self._stream)

    def synchronize(self) -> None:
        """Wait until everything launched here has ended."""
        self._stream.synchronize()
