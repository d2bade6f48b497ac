"""How services import what they are made of."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import sys
from collections.abc import Generator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


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


class Late:
    """A module that is imported when something is first asked of it: what few processes use must not delay them all.

    It stands for the module where the code runs; type checkers are shown an import.
    """

    def __init__(self, name: str) -> None:
        """name: the module's whole name."""
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        """Return what the module has under this name."""
        value = getattr(importlib.import_module(self._name), attribute)
        setattr(self, attribute, value)
        return value


@contextmanager
def without(package: str) -> Generator[None]:
    """Let modules that are imported within the block find a package missing, unless it is imported already."""
    if package in sys.modules:
        yield
        return
    missing: dict[str, Any] = {package: None}  # Python's sign for a module that is not to be found
    sys.modules.update(missing)
    try:
        yield
    finally:
        del sys.modules[package]


def import_within(package: str, name: str) -> ModuleType:
    """Import the module PACKAGE.NAME, but not what the package itself imports. Raises ImportError."""
    spec = None if package in sys.modules else importlib.util.find_spec(package)
    if spec is None:
        return importlib.import_module(f"{package}.{name}")
    sys.modules[package] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module(f"{package}.{name}")
    finally:
        del sys.modules[package]
