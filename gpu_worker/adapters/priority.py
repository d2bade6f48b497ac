"""Priority of work beside the steps, where the cores are busy."""

from __future__ import annotations

import os
import sys

NICENESS = 10
"""Added to the niceness of threads that bring adapters: beside one that computes they have about a tenth of a core.

As idle tasks (SCHED_IDLE) they would have 0.3 %, so that on a machine that other programs fill adapters never came; and
a thread that lost its core while it held the interpreter's lock would keep the engine from it as long.
"""


def lower_priority() -> None:
    """Give the calling thread, and the threads it starts, less of a busy core than steps. Does nothing but on Linux."""
    if sys.platform == "linux":  # elsewhere it would be the whole process
        os.nice(NICENESS)
