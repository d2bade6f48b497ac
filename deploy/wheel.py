"""Adds the compiled kernels to a wheel: `make wheel`. Without LORAFLEET_WHEEL, wheels hold only sources.

LORAFLEET_WHEEL is the processor family of the wheel: x86_64 or aarch64. Torch must be installed at build time, for its
headers. The wheel itself works with every torch version from 2.10 on, and with every Python version.
"""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBSTDCXX = {24: 28, 28: 31, 29: 34, 30: 35, 33: 39}
"""n of libstdc++'s GLIBCXX_3.4.n -> n of glibc 2.n of the oldest systems with it, as in manylinux."""


class KernelsHook(BuildHookInterface[Any]):
    """Compiles the kernels, and tags the wheel with the system that they require."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the compiled libraries to the wheel."""
        machine = os.environ.get("LORAFLEET_WHEEL")
        if not machine or version == "editable":
            return
        self._folder = tempfile.TemporaryDirectory()
        libraries = _compile(Path(self._folder.name), _builder(Path(self.root)), machine)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-manylinux_2_{max(map(oldest_system, libraries))}_{machine}"
        build_data["force_include"].update({str(library): f"lora_kernels/cpu/{library.name}" for library in libraries})

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Delete the compiled files."""
        if hasattr(self, "_folder"):
            self._folder.cleanup()


def _compile(folder: Path, builder: Any, machine: str) -> list[Path]:
    """Compile the operations and the kernels of each instruction set; return the paths of their libraries."""
    operations: Path | None = None
    libraries: list[Path] = []
    for isa in ("", *builder.ISA_FLAGS[machine]):
        own = folder / (isa or "operations")
        own.mkdir()
        libraries.append(builder.compile_library(own / builder.library_name(isa), machine, isa, operations))
        operations = libraries[0]
    return libraries


def oldest_system(library: Path) -> int:
    """Return n of glibc 2.n of the oldest systems that have every glibc and libstdc++ symbol that a library needs."""
    text = library.read_bytes()
    glibc = max((int(version) for version in re.findall(rb"GLIBC_2\.(\d+)", text)), default=0)
    libstdcxx = max((int(version) for version in re.findall(rb"GLIBCXX_3\.4\.(\d+)", text)), default=0)
    return max(glibc, min(system for version, system in LIBSTDCXX.items() if version >= libstdcxx))


def _builder(root: Path) -> Any:
    """Return the module lora_kernels.cpu.build without importing its package, which imports torch."""
    path = root / "kernels/lora_kernels/cpu/build.py"
    spec = importlib.util.spec_from_file_location("lora_kernels_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
