"""The CUDA stream on which adapters are copied to the device, in parallel with steps on the default stream."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

BUFFER_BYTES = 16 << 20
"""Page-locked memory per worker.

torch never releases page-locked memory and rounds it up to powers of two, so that locking each adapter's memory would
permanently take more than is accounted for.
"""

_ALIGN_BYTES = 256


class CopyBuffer:
    """Copies host tensors to a device through one buffer, so that only this needs to be page-locked."""

    def __init__(self, memory: Tensor, wait: Callable[[], object]) -> None:
        """memory: uint8 [bytes]. wait: blocks until all launched copies have ended."""
        self._memory, self._wait = memory, wait
        self._num_used = 0  # bytes that copies may still be reading

    def copy_(self, target: Tensor, source: Tensor) -> None:
        """Launch the copy of a host tensor to one of the same shape and dtype, both contiguous.

        The source may change once this returns. Blocks while the buffer is full.
        """
        to, data = target.view(-1).view(torch.uint8), source.view(-1).view(torch.uint8)
        done = 0
        while done < len(data):
            if self._num_used >= len(self._memory):
                self._wait()
                self._num_used = 0
            part = self._memory[self._num_used : self._num_used + len(data) - done]
            part.copy_(data[done : done + len(part)])
            to[done : done + len(part)].copy_(part, non_blocking=True)
            done += len(part)
            self._num_used += -(-len(part) // _ALIGN_BYTES) * _ALIGN_BYTES

    def reset(self) -> None:
        """Mark the whole buffer as free: all copies have ended."""
        self._num_used = 0


class CopyStream:
    """One device's stream for copies. Used by one thread at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        memory = torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True)
        self._buffer = CopyBuffer(memory, self._stream.synchronize)

    def allocate_like(self, tensor: Tensor) -> Tensor:
        """Return an empty, contiguous tensor of the same shape and dtype on the device.

        Its memory comes from the default stream, whose steps will read it. If freed before the copy ends, it is not
        reused until then.
        """
        allocated = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        allocated.record_stream(self._stream)
        return allocated

    def wait_for_steps(self) -> None:
        """Make later launches on this stream wait for all work of the default stream so far."""
        self._stream.wait_stream(torch.cuda.default_stream(self._device))

    def use(self) -> AbstractContextManager[object]:
        """Return a context in which the calling thread launches on this stream."""
        return torch.cuda.stream(self._stream)

    def copy_(self, target: Tensor, source: Tensor) -> None:
        """Launch a copy to the device, within `use`; see `CopyBuffer.copy_`."""
        self._buffer.copy_(target, source)

    def synchronize(self) -> None:
        """Wait until everything launched here has ended."""
        self._stream.synchronize()
        self._buffer.reset()
