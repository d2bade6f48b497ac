"""Compiles the native kernels: for a wheel, which ships them, or once per machine into the user's cache.

One library has the operations; another per instruction set has its kernels, of which a machine compiles only those it
uses. File names in the cache contain a hash of all inputs of the build, so that no version uses another's build. Run
`python -m lora_kernels.cpu` to build ahead of time.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

SHIPPED = Path(__file__).parent
"""Folder of the libraries that a wheel ships; a source tree has none there."""

COMMON_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
_SOURCE_DIR = Path(__file__).parent / "csrc"
_HOST_PARTS = ("bind", "core", "stack")
_ISA_PARTS = ("products", "attention", "quantised", "rows")  # slowest first, so that all cores finish together
_WRITTEN_BY_OTHERS = 0o022
_TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # 2.10, as pyproject.toml requires
_AVX512 = "-march=skylake-avx512"
ISA_FLAGS = {
    "x86_64": {
        "avx2": ("-mavx2", "-mfma", "-mf16c"),
        "avx2_vnni": ("-mavx2", "-mfma", "-mf16c", "-mavxvnni"),
        "avx512": (_AVX512,),
        "avx512_vnni": (_AVX512, "-mavx512vnni"),
        "avx512_bf16": (_AVX512, "-mavx512vnni", "-mavx512bf16"),
        "amx_bf16": (_AVX512, "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    },
    "aarch64": {"neon": ()},
}
"""Processor family -> instruction set -> compiler flags for the files in csrc/isa."""
_log = logging.getLogger(__name__)


class BuildError(Exception):
    """The native kernels cannot be built or used on this machine; the message says why."""


def build_library(isa: str = "", flags: Sequence[str] = COMMON_FLAGS, machine: str = "") -> Path:
    """Return a library: a shipped one, else the cached one, which is built if missing (half a minute).

    isa: the instruction set of its kernels, or "" for the operations. flags: compiler flags for every source. machine:
    the processor family, "" for this machine's. Raises BuildError.
    """
    if (shipped := SHIPPED / library_name(isa)).exists():
        return shipped
    machine = machine or platform.machine()
    if machine not in ISA_FLAGS or sys.platform != "linux":
        raise BuildError(f"they are for Linux on {' and '.join(ISA_FLAGS)}, this is {sys.platform} on {machine}")
    operations = build_library("", flags, machine) if isa else None
    library = cache_dir() / library_name(isa, fingerprint(machine, flags))
    if _is_own(library):
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with (library.parent / "lora_kernels.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers of one machine start together: one of them builds
        if not _is_own(library):
            what = f"native kernels for {isa}" if isa else "native operations"
            _log.info("compiling %s: first start only, about %d s on two cores", what, 25 if isa else 10)
            begin = time.monotonic()
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                built = compile_library(Path(folder) / library.name, machine, isa, operations, flags)
                built.chmod(0o755)  # the umask may let a group write new files, which `_is_own` refuses
                os.replace(built, library)
            _log.info("compiled %s in %.0f s", what, time.monotonic() - begin)
    return library


def library_name(isa: str, version: str = "") -> str:
    """Return the file name of an instruction set's kernels, or of the operations if `isa` is "".

    version: distinguishes several in one folder.
    """
    return f"{'-'.join(filter(None, ('lora_kernels', version, isa)))}.so"


def cache_dir() -> Path:
    """Return the folder of compiled kernels: $LORAFLEET_CACHE_DIR, else lorafleet/ in the user's cache.

    No other user may be able to write it, because its files are executed. If the folder is someone else's or
    world-writable, a private subfolder is used; if that is not safe either, a new temporary folder per start.
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
    """Return whether a path exists, is not a link, is owned by this user or root, and only writable by its owner."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return not stat.S_ISLNK(found.st_mode) and _is_closed(found)


def _is_closed(found: os.stat_result) -> bool:
    return found.st_uid in (os.geteuid(), 0) and not found.st_mode & _WRITTEN_BY_OTHERS


def fingerprint(machine: str, flags: Sequence[str]) -> str:
    """Hash everything the library depends on except the compiler: a machine with a finished build needs none.

    Machines of several families may share a home, and thus a cache.
    """
    digest = hashlib.sha256(repr((machine, *flags)).encode())
    sources = sorted(path for path in _SOURCE_DIR.rglob("*") if path.is_file())
    for source in (Path(__file__), *sources):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def compile_library(
    library: Path, machine: str, isa: str = "", operations: Path | None = None, flags: Sequence[str] = COMMON_FLAGS
) -> Path:
    """Compile a library for a processor family, in an otherwise empty folder; return its path.

    isa: as in `build_library`; its library links to that of the `operations`. Raises BuildError. The operations depend
    only on torch's stable ABI, not on the version of torch (from 2.10) or Python.
    """
    default = "g++" if machine == platform.machine() else f"{machine}-linux-gnu-g++"
    compiler = shutil.which(os.environ.get("CXX", default))
    if compiler is None:
        raise BuildError(f"no C++ compiler: {os.environ.get('CXX', default)} is not on the path")
    folder, parts = (_SOURCE_DIR / "isa", _ISA_PARTS) if isa else (_SOURCE_DIR, _HOST_PARTS)
    jobs = [[str(folder / f"{part}.cpp"), "-o", str(library.with_suffix(f".{part}.o"))] for part in parts]
    flags = [*flags, *(ISA_FLAGS[machine][isa] if isa else ())]
    if not isa:
        jobs[0] += [_TORCH_TARGET, "-isystem", str(_torch_headers())]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(lambda job: _run([compiler, *flags, "-c", *job]), jobs))
    # The dynamic loader needs only the name of a library that is already loaded and has the symbols: torch's, which an
    # empty library stands for, or the operations', which opens that of an instruction set.
    needed = operations or library.with_name("libtorch_cpu.so")
    if operations is None:
        empty = ["-nostdlib", f"-Wl,-soname,{needed.name}", "-x", "c++", os.devnull]
        _run([compiler, "-shared", *empty, "-o", str(needed)])
    linked = [*(job[2] for job in jobs), "-Wl,--no-as-needed", str(needed), "-ldl"]
    _run([compiler, "-shared", "-s", f"-Wl,-soname,{library.name}", "-o", str(library), *linked])
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
