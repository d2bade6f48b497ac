"""Compiles the native kernels once per machine and keeps the result in the user's cache.

The file's name contains a hash of everything that it is built from, so no version ever uses another one's build. Run
`python -m lora_kernels.cpu` to build ahead of time, in a container image for example.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

_SOURCE_DIR = Path(__file__).parent / "csrc"
COMMON_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
_HOST_PARTS = ("bind", "pack", "quantised", "stack", "states", "team")
_ISA_FLAGS = {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-march=skylake-avx512",),
    "avx512_bf16": ("-march=skylake-avx512", "-mavx512bf16"),
}


class BuildError(Exception):
    """The native kernels cannot be built or used on this machine; the message says why."""


def build_library(flags: Sequence[str] = COMMON_FLAGS, machine: str = "") -> Path:
    """Return the compiled library, building it first if this version is not in the cache (about 10 s).

    flags: of the compiler, for every source. machine: the processor's family, "" for this machine's. Raises BuildError.
    """
    machine = machine or platform.machine()
    if machine not in ("x86_64", "AMD64"):
        raise BuildError(f"they are written for x86-64, this is {machine}")
    library = cache_dir() / f"lora_kernels-{fingerprint(flags)}.so"
    if library.exists():
        return library
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise BuildError(f"no C++ compiler: {os.environ.get('CXX', 'g++')} is not on the path")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as build_dir:
        built = _compile(compiler, flags, Path(build_dir))
        # Two processes may build at the same time: each puts a complete file in place.
        os.replace(built, library)
    return library


def cache_dir() -> Path:
    """Return the folder of compiled kernels: $LORAFLEET_CACHE_DIR, else lorafleet/ in the user's cache."""
    chosen = os.environ.get("LORAFLEET_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorafleet"


def fingerprint(flags: Sequence[str] = COMMON_FLAGS) -> str:
    """Hash all that the library depends on, but for the compiler: a machine with a finished build needs none."""
    digest = hashlib.sha256(repr((torch.__version__, tuple(flags), _ISA_FLAGS)).encode())
    for source in sorted(_SOURCE_DIR.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(compiler: str, flags: Sequence[str], build_dir: Path) -> Path:
    torch_dir = Path(torch.__file__).parent
    include = torch_dir / "include"
    # The OpenMP runtime is not linked: torch has loaded it already.
    bind_flags = [
        "-fopenmp",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *("-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")),
    ]
    jobs = [[*bind_flags, str(_SOURCE_DIR / f"{name}.cpp"), "-o", str(build_dir / f"{name}.o")] for name in _HOST_PARTS]
    for isa, isa_flags in _ISA_FLAGS.items():
        source, output = str(_SOURCE_DIR / "isa.cpp"), str(build_dir / f"{isa}.o")
        jobs.append([f"-DLORAFLEET_ISA={isa}", *isa_flags, source, "-o", output])
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(lambda job: _run([compiler, *flags, "-c", *job]), jobs))
    library = build_dir / "lora_kernels.so"
    objects = [job[-1] for job in jobs]
    _run([compiler, "-shared", "-o", str(library), *objects, f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-lc10"])
    return library


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise BuildError(f"{' '.join(command)} failed:\n{result.stderr[-4000:]}")
