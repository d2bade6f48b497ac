"""Finding out where the host waits for a GPU in the middle of a step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_waits() -> Iterator[None]:
    """Raise RuntimeError where the host waits for the device, as far as torch notices."""
    before = torch.cuda.get_sync_debug_mode()
    _set_mode("error")
    try:
        yield
    finally:
        _set_mode(before)


def _set_mode(mode: int | str) -> None:
    """Set what happens where the host waits. torch warns that this is a prototype, which is no news here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode(mode)


def is_wait(error: RuntimeError) -> bool:
    """Return whether an error is that of `no_waits`."""
    return "synchronizing CUDA operation" in str(error)
