"""Priority of threads: steps come first where the cores are busy."""

from __future__ import annotations

import os
import sys


def lower_priority() -> None:
    """Run the calling thread, and the threads it starts, as SCHED_IDLE. Does nothing but on Linux.

    A thread that wakes up takes the core from an idle task at once. A task that is only nice keeps the core for some
    milliseconds, during which a step waits.
    """
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
