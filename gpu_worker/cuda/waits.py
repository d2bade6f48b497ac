"""Detects where the host waits for a GPU inside a step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_waits() -> Iterator[None]:
    """Raise RuntimeError if the host waits for the device in the block, as far as torch detects it."""
    before = torch.cuda.get_sync_debug_mode()
    _set_mode("error")
    try:
        yield
    finally:
        _set_mode(before)


def _set_mode(mode: int | str) -> None:
    """Set torch's reaction to host waits, without its warning that this is a prototype."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode(mode)


def is_wait(error: RuntimeError) -> bool:
    """Return whether an error was raised by `no_waits`."""
    return "synchronizing CUDA operation" in str(error)
