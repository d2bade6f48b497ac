"""Gives this process a wall clock that is wrong by the seconds in a file, which is read again every second.

Python imports this module at its start if the folder is on PYTHONPATH. Monotonic clocks are not changed.
"""

import os
import time
from pathlib import Path

if file := os.environ.get("CHAOS_CLOCK"):
    _FILE = Path(file)
    _real_ns = time.time_ns
    _wrong_ns, _read_s = 0, -1.0

    def _time_ns() -> int:
        global _wrong_ns, _read_s
        now_s = time.monotonic()
        if now_s - _read_s >= 1:
            _wrong_ns, _read_s = 10**9 * int(_FILE.read_text()), now_s
        return _real_ns() + _wrong_ns

    def _time() -> float:
        return _time_ns() / 1e9

    time.time_ns, time.time = _time_ns, _time
