"""How services import what they are made of."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def importing() -> Generator[None]:
    """Do not look for garbage within the block, which imports modules, nor among what it imported ever after.

    Imported modules stay for ever, and looking through their objects once takes a fifth of the time that torch and
    transformers need.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
