"""Who gets the cores where they are busy: steps first."""

from __future__ import annotations

import os
import sys


def lower_priority() -> None:
    """Let the calling thread, and those it starts, have what steps of warm requests leave of the cores.

    As an idle task, from which whatever else wakes up takes the core at once: one that is only nice
    keeps it for some milliseconds, while a step waits. On Linux alone; elsewhere threads have no priorities.
    """
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
