"""A locked-down process can compute and answer, and do nothing else."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROBE = """
import ctypes, json, os, random, resource, socket, subprocess, threading, time
from gateway.sandbox.lockdown import lock_down

def tries(what):
    try:
        what()
    except OSError as error:
        return f"errno {error.errno}"
    except Exception as error:
        return type(error).__name__
    return "done"

libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "")

parent, probes = os.getppid(), {
    "read": lambda: open("/etc/passwd").close(),
    "write": lambda: open("/tmp/lockdown", "w").close(),
    "list": lambda: os.listdir("/"),
    "delete": lambda: os.unlink("/tmp/lockdown"),
    "socket": socket.socket,
    "pair": socket.socketpair,
    "fork": os.fork,
    "spawn": lambda: subprocess.run(["/bin/true"]),
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "signal": lambda: os.kill(parent, 0),
    "limit": lambda: resource.prlimit(parent, resource.RLIMIT_CPU),
    "thread": lambda: threading.Thread(target=print).start(),
    "io_uring": lambda: call(425, 1, 0),
    "memory": lambda: bytearray(1 << 29),
    "compute": lambda: (bytearray(1 << 24), random.random(), os.urandom(8), time.localtime(), time.monotonic()),
}
filtered = lock_down(parent, 1 << 28)
print(json.dumps({"filtered": filtered, **{name: tries(probe) for name, probe in probes.items()}}))
"""


def test_nothing_but_computing_is_left() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("filtered") is True
    assert found.pop("compute") == "done"
    assert found.pop("memory") == "MemoryError"
    assert found.pop("thread") == "RuntimeError"
    assert found == dict.fromkeys(found, "errno 1")


@pytest.mark.parametrize("closes", ["os.abort()", "os.kill(os.getpid(), 0)"])
def test_a_process_can_end_itself_only(closes: str) -> None:
    code = f"import os; from gateway.sandbox.lockdown import lock_down; lock_down(os.getppid(), 1 << 28); {closes}"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode != 0


def test_a_process_whose_parent_has_ended_does_not_start() -> None:
    code = "import os; from gateway.sandbox.lockdown import lock_down; lock_down(1 << 30, 1 << 28); print('started')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
