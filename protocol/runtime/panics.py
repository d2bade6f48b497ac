"""Panics of libraries in Rust, which Python gets as a BaseException: no `except Exception` sees one."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

from protocol.wire.errors import LorafleetError


@contextmanager
def panics_as(error: Callable[[str], LorafleetError]) -> Generator[None]:
    """Raise `error`, with the panic's text, in the place of a panic."""
    try:
        yield
    except BaseException as panic:
        if type(panic).__name__ != "PanicException":
            raise
        raise error(f"a library failed: {' '.join(str(panic).split())[:200]}") from panic
