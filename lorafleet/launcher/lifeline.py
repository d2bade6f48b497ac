"""Ends the processes of a fleet together with their launcher, however the launcher ends.

The queue server is a foreign binary, so it gets Linux's parent-death signal. A service gets the read end of a pipe as
its standard input. Only the launcher has the write end, so the pipe closes when the launcher ends, and the service then
kills its own process group. Unlike the signal, this also ends compilers and other children of a service.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable

VARIABLE = "LORAFLEET_LIFELINE"
"""Set for a service whose standard input is a lifeline."""

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)  # loaded here, because a forked child must not load libraries


def die_with_parent() -> Callable[[], None]:
    """Return a `preexec_fn` that makes Linux send SIGTERM to the new process when the forking thread ends.

    The signal depends on the thread and not on its process, so Popen must be called in the main thread.
    """
    parent = os.getpid()

    def ask() -> None:
        if hasattr(_libc, "prctl"):
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # the parent died before the call
                os._exit(1)

    return ask


def hold_lifeline() -> None:
    """Kill this process group when standard input ends, if the launcher has set the variable."""
    if os.environ.pop(VARIABLE, ""):
        threading.Thread(target=_wait_for_the_end, name="lifeline", daemon=True).start()


def _wait_for_the_end() -> None:
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)
