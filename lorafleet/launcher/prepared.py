"""A process that imports torch before it is told which service it is: the first start of a fleet's first worker.

`lorafleet up` starts it before it reads its own settings, so that it waits neither for them nor for the queue.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping

from lorafleet.launcher.lifeline import die_with_parent, outlive_parent
from protocol.runtime.environment import SERVICES, child_environment
from protocol.runtime.imports import importing

SERVICE, NAME = "worker", "worker-0"

IMPORTED = ("torch", "lorafleet.serve", "protocol.queue.bus")
"""What a worker is made of and reads no settings when it is imported."""


class Prepared:
    """The process, as its launcher sees it."""

    def __init__(self) -> None:
        """Start it. Call it from the main thread only, see `die_with_parent`."""
        self._line, theirs = socket.socketpair()
        # The name and the words are there for who looks at the list of processes.
        command = [sys.executable, "-m", __name__, NAME, "serve", SERVICE]
        with theirs:
            self._process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True, preexec_fn=die_with_parent(),
                env=child_environment(*SERVICES[SERVICE]) | {"PYTHONUNBUFFERED": "1"},
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    def become(self, environment: Mapping[str, str], stdin: int, output: int) -> Adopted | None:
        """Make it the service, with these variables and files. Returns None where it has ended."""
        message = json.dumps(dict(environment)).encode() + b"\n"
        try:
            socket.send_fds(self._line, [message[:1]], [stdin, output])
            self._line.sendall(message[1:])
        except OSError:
            self.end()
            return None
        self._line.close()
        return Adopted(self._process)

    def end(self) -> None:
        """Kill it, unless it has become the service or has ended."""
        if self._line.fileno() >= 0:
            self._line.close()
            self._process.kill()
            self._process.wait()


class Adopted:
    """The process once it is the service, used as an `asyncio.subprocess.Process`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.pid = process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, or the signal that ended it as a negative number; None while it runs."""
        return self._process.poll()

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        self._process.send_signal(number)

    async def wait(self) -> int:
        """Wait for its end; return `returncode`."""
        return await asyncio.to_thread(self._process.wait)


def prepare(words: list[str]) -> Prepared | None:
    """Start a process for the command line `words` if it starts a fleet, and this is the main thread."""
    starts = words[:1] in (["up"], ["demo"]) and not {"-h", "--help"} & set(words)
    return Prepared() if starts and threading.current_thread() is threading.main_thread() else None


def main() -> int:
    """Import, wait for what to be, and be it. Returns the exit code."""
    with importing():
        for module in IMPORTED:
            try:
                importlib.import_module(module)
            except ImportError:  # the service itself says what is missing
                break
    with socket.socket(fileno=os.dup(0)) as line:
        message, files, _, _ = socket.recv_fds(line, 1 << 16, 2)
        while message and not message.endswith(b"\n"):
            more = line.recv(1 << 16)
            if not more:
                return 1
            message += more
    if not message:
        return 1
    outlive_parent()
    for number, file in zip((0, 1, 2), (files[0], files[1], files[1]), strict=True):
        os.dup2(file, number)
    for file in files:
        os.close(file)
    os.environ.clear()
    os.environ.update(json.loads(message))
    sys.argv = ["lorafleet", "serve", SERVICE]
    runpy.run_module("lorafleet", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
