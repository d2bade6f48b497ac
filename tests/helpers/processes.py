"""Functions that inspect the processes of this machine."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import psutil


def num_open_files() -> int:
    """Return the number of open file descriptors of this process, after a garbage collection."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def is_running(pid: int) -> bool:
    """Return whether a process exists and is not a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def with_variable(name: str, value: str) -> list[psutil.Process]:
    """Return the processes that were started with this environment variable."""
    return _processes(lambda process: process.environ().get(name) == value)


def working_below(folder: Path) -> list[psutil.Process]:
    """Return the processes whose working directory is below a folder."""
    return _processes(lambda process: Path(process.cwd()).is_relative_to(folder))


def _processes(matches: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if matches(process) and is_running(process.pid):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue  # the process has ended, or belongs to another user
    return found


def read_pid(file: Path) -> int:
    """Return the process id written in a file, 0 if it is not written yet."""
    text = file.read_text() if file.exists() else ""
    return int(text) if text.endswith("\n") else 0
