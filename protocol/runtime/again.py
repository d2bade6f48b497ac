"""Restarts a process in place: the same process id and command line, and its original environment.

Only the process id, the standard streams and the children of the old process remain.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import NoReturn

SWAP_VARIABLE = "LORAFLEET_SWAP"
"""Tells a restarted worker which base to serve; see `gpu_worker/service/program.py`."""

_given: dict[str, str] | None = None
_began_ms = time.time_ns() // 1_000_000


def note_start() -> None:
    """Save the environment for `start_again`. Must be called before any variable is changed or deleted."""
    global _given
    _given = dict(os.environ)


def began_ms() -> int:
    """Return the unix time in ms when this program started."""
    return _began_ms


def start_again(more: Mapping[str, str]) -> NoReturn:
    """Replace this process with a new start of its program. more: additional environment variables.

    No file descriptor except the standard streams survives, not even one that a library has made inheritable. Other
    threads end. Raises OSError if the program cannot be executed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    for fd in [int(name) for name in os.listdir("/dev/fd")]:
        if fd > 2:
            with suppress(OSError):  # the descriptor of the listing itself is closed by now
                os.set_inheritable(fd, False)
    environment = dict(os.environ) if _given is None else _given
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**environment, **more})
