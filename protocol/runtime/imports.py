"""Helpers for imports in services."""

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
    """Disable garbage collection while the block imports modules, and exclude their objects from later collections.

    Imported modules stay forever, and scanning their objects once takes a fifth of the import time of torch and
    transformers.
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
    """A module that is imported at its first use: what few processes need must not delay all of them.

    At run time it stands for the module; type checkers see an import.
    """

    def __init__(self, name: str) -> None:
        """name: the module's full name."""
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        """Return the module's attribute of this name."""
        value = getattr(importlib.import_module(self._name), attribute)
        setattr(self, attribute, value)
        return value


@contextmanager
def without(package: str) -> Generator[None]:
    """Let modules imported in the block find a package missing, unless it is already imported."""
    if package in sys.modules:
        yield
        return
    missing: dict[str, Any] = {package: None}  # Python's marker for a module that cannot be found
    sys.modules.update(missing)
    try:
        yield
    finally:
        del sys.modules[package]


def import_within(package: str, name: str) -> ModuleType:
    """Import the module PACKAGE.NAME without running the package's own __init__. Raises ImportError."""
    spec = None if package in sys.modules else importlib.util.find_spec(package)
    if spec is None:
        return importlib.import_module(f"{package}.{name}")
    sys.modules[package] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module(f"{package}.{name}")
    finally:
        del sys.modules[package]
