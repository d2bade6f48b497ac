"""Compiles the native kernels: for a wheel, which carries them, or once per machine into the user's cache.

The name of a file in the cache contains a hash of everything that it is built from, so no version ever uses another
one's build. Run `python -m lora_kernels.cpu` to build ahead of time.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

SHIPPED = Path(__file__).parent / "lora_kernels.so"
"""The library of a wheel that carries it; it is not there in a source tree."""

COMMON_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
_SOURCE_DIR = Path(__file__).parent / "csrc"
_HOST_PARTS = ("bind", "lora", "operations", "pack", "processor", "quantised", "stack", "states", "team")
_WRITTEN_BY_OTHERS = 0o022
_TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # 2.10, as pyproject.toml demands
ISA_FLAGS = {
    "x86_64": {
        "avx2": ("-mavx2", "-mfma", "-mf16c"),
        "avx512": ("-march=skylake-avx512",),
        "avx512_bf16": ("-march=skylake-avx512", "-mavx512bf16", "-mavx512vnni"),
        "amx_bf16": ("-march=skylake-avx512", "-mavx512bf16", "-mavx512vnni", "-mamx-tile", "-mamx-bf16"),
    },
    "aarch64": {"neon": ()},
}
"""Family of processors -> instruction set -> the flags of isa.cpp for it."""


class BuildError(Exception):
    """The native kernels cannot be built or used on this machine; the message says why."""


def build_library(flags: Sequence[str] = COMMON_FLAGS, machine: str = "") -> Path:
    """Return the library: the shipped one, else that of the cache, which is built if it is not there (a minute).

    flags: of the compiler, for every source. machine: the processor's family, "" for this machine's. Raises BuildError.
    """
    if SHIPPED.exists():
        return SHIPPED
    machine = machine or platform.machine()
    if machine not in ISA_FLAGS or sys.platform != "linux":
        raise BuildError(f"they are for Linux on {' and '.join(ISA_FLAGS)}, this is {sys.platform} on {machine}")
    library = cache_dir() / f"lora_kernels-{fingerprint(flags)}.so"
    if _is_own(library):
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with (library.parent / "lora_kernels.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers of one machine start together: one of them builds
        if not _is_own(library):
            with tempfile.TemporaryDirectory(dir=library.parent) as build_dir:
                os.replace(compile_library(Path(build_dir), machine, flags), library)
    return library


def cache_dir() -> Path:
    """Return the folder of compiled kernels: $LORAFLEET_CACHE_DIR, else lorafleet/ in the user's cache.

    Nobody else may write it, for what lies there is run: in a folder of somebody else's, or of everybody, it is one of
    this user's own, and if that is taken as well one that is new at each start.
    """
    chosen = os.environ.get("LORAFLEET_CACHE_DIR")
    home = os.environ.get("XDG_CACHE_HOME")
    folder = Path(chosen) if chosen else Path(home or Path.home() / ".cache") / "lorafleet"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid == os.geteuid():
            folder.chmod(found.st_mode & 0o7777 & ~_WRITTEN_BY_OTHERS)
            return folder
        if _is_closed(found):
            return folder
        own = folder / f"own-{os.geteuid()}"
        own.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return folder
    return own if _is_own(own) else _new_folder()


@functools.cache
def _new_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="lora_kernels-"))


def _is_own(path: Path) -> bool:
    """Return whether a file or folder is there that this user or root owns, and nobody else may write. No link is."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return not stat.S_ISLNK(found.st_mode) and _is_closed(found)


def _is_closed(found: os.stat_result) -> bool:
    return found.st_uid in (os.geteuid(), 0) and not found.st_mode & _WRITTEN_BY_OTHERS


def fingerprint(flags: Sequence[str] = COMMON_FLAGS) -> str:
    """Hash all that the library depends on, but for the compiler: a machine with a finished build needs none."""
    digest = hashlib.sha256(repr(tuple(flags)).encode())
    sources = sorted(path for path in _SOURCE_DIR.rglob("*") if path.is_file())
    for source in (Path(__file__), *sources):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def compile_library(build_dir: Path, machine: str, flags: Sequence[str] = COMMON_FLAGS) -> Path:
    """Compile the library for a family of processors in an empty folder; return its path there. Raises BuildError.

    It depends on torch's stable ABI alone, so neither on the version of torch, from 2.10 on, nor on that of Python.
    """
    default = "g++" if machine == platform.machine() else f"{machine}-linux-gnu-g++"
    compiler = shutil.which(os.environ.get("CXX", default))
    if compiler is None:
        raise BuildError(f"no C++ compiler: {os.environ.get('CXX', default)} is not on the path")
    jobs = [[str(_SOURCE_DIR / f"{name}.cpp"), "-o", str(build_dir / f"{name}.o")] for name in _HOST_PARTS]
    jobs[0] += [_TORCH_TARGET, "-isystem", str(_torch_headers())]
    for isa, isa_flags in ISA_FLAGS[machine].items():
        source, output = str(_SOURCE_DIR / "isa.cpp"), str(build_dir / f"{isa}.o")
        jobs.append([source, "-o", output, f"-DLORAFLEET_ISA={isa}", *isa_flags])
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(lambda job: _run([compiler, *flags, "-c", *job]), jobs))
    # An empty library stands for torch's: the loader needs no more than the name of the one that has the functions.
    stub = build_dir / "libtorch_cpu.so"
    _run([compiler, "-shared", "-nostdlib", f"-Wl,-soname,{stub.name}", "-x", "c++", os.devnull, "-o", str(stub)])
    library = build_dir / "lora_kernels.so"
    _run([compiler, "-shared", "-s", "-o", str(library), *(job[2] for job in jobs), "-Wl,--no-as-needed", str(stub)])
    return library


def _torch_headers() -> Path:
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        raise BuildError("torch is not installed, whose headers the kernels are compiled with")
    return Path(torch.origin).parent / "include"


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise BuildError(f"{' '.join(command)} failed:\n{result.stderr[-4000:]}")
