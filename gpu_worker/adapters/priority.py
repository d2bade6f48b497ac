"""Scheduling priority of threads that load adapters, relative to the steps."""

from __future__ import annotations

import os
import sys

NICENESS = 10
"""Added to the niceness of threads that load adapters: beside a computing thread they get about a tenth of a core.

As idle tasks (SCHED_IDLE) they would get 0.3 %, so that on a machine busy with other programs adapters would never be
loaded; and a thread preempted while it holds the GIL would block the engine as long.
"""


def lower_priority() -> None:
    """Lower the priority of the calling thread and of threads it starts. Does nothing except on Linux."""
    if sys.platform == "linux":  # elsewhere it would affect the whole process
        os.nice(NICENESS)
