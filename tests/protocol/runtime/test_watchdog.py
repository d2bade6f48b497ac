"""A process that hangs is ended, with its stacks in the log, wherever it hangs."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import asyncio, re, sys, threading, time
from protocol.runtime.service import run
from protocol.runtime.watchdog import WATCHDOG

num_turns = 0
LIMIT_S = float(sys.argv[2])

def spin():
    re.match("(a+)+$", "a" * 64 + "b")  # never lets go of the interpreter

def sleep_in_a_step():
    threading.Event().wait()

async def block(stop):
    spin()

async def in_a_thread(stop, stuck):
    WATCHDOG.require(lambda: num_turns, LIMIT_S)
    threading.Thread(target=stuck, daemon=True).start()
    await stop.wait()
    return 0

async def work(stop):
    global num_turns
    WATCHDOG.require(lambda: num_turns, LIMIT_S)
    began = time.monotonic()
    while time.monotonic() < began + 1.5 * LIMIT_S:
        num_turns += 1
        await asyncio.sleep(0.01)
    return 0

async def end_and_stay(stop):
    threading.Thread(target=sleep_in_a_step).start()  # Python waits for it at its end
    return 0

mains = {
    "loop": block,
    "thread": lambda stop: in_a_thread(stop, sleep_in_a_step),
    "interpreter": lambda stop: in_a_thread(stop, spin),
    "end": end_and_stay,
    "work": work,
}
WATCHDOG.limit_s = LIMIT_S
sys.exit(run(mains[sys.argv[1]]))
"""


def run_program(which: str, limit_s: float = 1.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, which, str(limit_s)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("which", "stack"),
    [
        pytest.param("loop", "in spin", marks=pytest.mark.thorough),
        ("thread", "in sleep_in_a_step"),
        ("interpreter", "in spin"),
        pytest.param("end", "in sleep_in_a_step", marks=pytest.mark.thorough),
    ],
)
def test_a_process_that_is_stuck_tells_where_and_ends(which: str, stack: str) -> None:
    ended = run_program(which)
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr
    assert stack in ended.stderr


def test_a_process_that_works_goes_on_for_longer_than_the_limit() -> None:
    ended = run_program("work", 5.0)  # longer than a busy machine delays its turns
    assert (ended.returncode, ended.stderr) == (0, "")
