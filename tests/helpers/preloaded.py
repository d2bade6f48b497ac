"""Services of test fleets as forks of one process per test run, which has imported their modules.

A worker spends three seconds of CPU time on importing torch and transformers, and these tests start dozens. A fork runs
`lorafleet serve` in its own session, with its own environment and output, and it ends like any other process.
`helpers.fleets.fleet_up` starts services as users do.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import BinaryIO

from chaos.fleet import ServiceProcess, spawn

PRELOADED = ["gpu_worker.build", "gateway.service", "scheduler.service", "adapter_store.service", "lorafleet.serve"]

_context = multiprocessing.get_context("forkserver")


class ForkedProcess:
    """A forked service with the interface of `subprocess.Popen`."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], stdin: int, log: str) -> None:
        """Run `lorafleet` with these arguments."""
        with Connection(os.dup(stdin), writable=False) as lifeline:
            self._process = _context.Process(target=_run, args=(tuple(words), dict(environment), lifeline, log))
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, or the signal that ended the process as a negative number; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return `returncode`."""
        return self.returncode

    def wait(self) -> int:
        """Wait until the process ends; return `returncode`."""
        self._process.join()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, sig: int) -> None:
        """Send a signal, if the process still runs."""
        if self.poll() is None:
            os.kill(self.pid, sig)


def fork(command: Sequence[str], environment: Mapping[str, str], stdin: int, log: BinaryIO) -> ServiceProcess:
    """Start a service like `chaos.fleet.spawn`, but as a fork."""
    if "COVERAGE_PROCESS_CONFIG" in environment:  # coverage follows started programs, not forks of other processes
        return spawn(command, environment, stdin, log)
    _context.set_forkserver_preload(PRELOADED)
    return ForkedProcess(command[command.index("lorafleet") + 1 :], environment, stdin, log.name)


def _run(words: tuple[str, ...], environment: dict[str, str], lifeline: Connection, log: str) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for number, fd in enumerate((lifeline.fileno(), output, output)):
        os.dup2(fd, number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from lorafleet.__main__ import main

    sys.exit(main(words))
