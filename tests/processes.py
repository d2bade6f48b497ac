"""Looking at processes from the outside."""

from __future__ import annotations

from pathlib import Path

import psutil


def is_running(pid: int) -> bool:
    """Tell whether a process is there and no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def with_variable(name: str, value: str) -> list[psutil.Process]:
    """Return the processes that were started with an environment variable, this one not among them."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(name) == value and is_running(process.pid):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def read_pid(file: Path) -> int:
    """Return the process id written in a file, 0 while there is none."""
    text = file.read_text() if file.exists() else ""
    return int(text) if text.endswith("\n") else 0
