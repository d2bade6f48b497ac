"""A process that starts itself again in its place: the same id and command line, and the environment it was given.

Nothing of the old process is left in the new one but its id, its standard streams and its children.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import NoReturn

SWAP_VARIABLE = "LORAFLEET_SWAP"
"""Tells a worker that has started itself again which base to serve; see `gpu_worker/service/program.py`."""

_given: dict[str, str] | None = None
_began_ms = time.time_ns() // 1_000_000


def note_start() -> None:
    """Keep the environment for `start_again`. To be called before anything of it is changed or forgotten."""
    global _given
    _given = dict(os.environ)


def began_ms() -> int:
    """Return the unix time, in ms, at which this program began."""
    return _began_ms


def start_again(more: Mapping[str, str]) -> NoReturn:
    """Replace this process by a new start of its program, with `more` variables.

    No file descriptor but the standard streams outlives it, also none that a library has left open to children. Other
    threads end. Raises OSError when the program cannot be executed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    for fd in [int(name) for name in os.listdir("/dev/fd")]:
        if fd > 2:
            with suppress(OSError):  # that of the list itself is closed by now
                os.set_inheritable(fd, False)
    environment = dict(os.environ) if _given is None else _given
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**environment, **more})
