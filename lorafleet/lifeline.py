"""How processes end with the launcher, however it ends.

The queue server, a foreign binary, gets Linux's parent-death signal. A service gets the reading end of a pipe as its
standard input; when the last writing end is gone, so is the launcher, and the service kills its whole process group:
unlike the signal, that reaches compilers and other children of a service too.
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
_libc = ctypes.CDLL(None)  # loaded here, since a forked child must not


def die_with_parent() -> Callable[[], None]:
    """Return a `preexec_fn` by which Linux sends SIGTERM to the new process when this thread ends.

    The signal belongs to the thread that forks, not to its process: call Popen from the main thread.
    """
    parent = os.getpid()

    def ask() -> None:
        if hasattr(_libc, "prctl"):
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # it died before we asked
                os._exit(1)

    return ask


def hold_lifeline() -> None:
    """Kill this process group once standard input ends, if the launcher asked for it."""
    if os.environ.pop(VARIABLE, ""):
        threading.Thread(target=_wait_for_the_end, name="lifeline", daemon=True).start()


def _wait_for_the_end() -> None:
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)
