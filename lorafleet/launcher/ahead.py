"""A worker process that is started before its settings are known, and imports meanwhile.

A worker imports torch for half a second, and the launcher needs as long until it can start one. So `lorafleet up`
starts this process first of all. It is one like any other worker's: a program of its own, with the variables that a
worker gets; what the launcher has read besides reaches it as a line on its standard input, which then is its lifeline.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from lorafleet.launcher import lifeline
from lorafleet.launcher.machine import num_cores
from protocol.runtime.environment import SERVICES, child_environment
from protocol.runtime.imports import importing
from protocol.runtime.private_files import use_private_umask

OWN = "LORAFLEET_"
"""Begins the names of variables that are only read once the settings are."""


class WorkerAhead:
    """A process that becomes the first worker, unless that is to have other variables."""

    def __init__(self) -> None:
        """Start it."""
        # As `service_specs` sets them for one worker. The libraries that are imported read them at once.
        threads = os.environ.get("OMP_NUM_THREADS", str(num_cores()))
        more = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads}
        self._environment = child_environment(*SERVICES["worker"]) | more
        self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
            [sys.executable, "-m", "lorafleet.launcher.ahead", "serve", "worker"], env=self._environment,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def take(self, environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes] | None:
        """Let the process be a worker with these variables that writes to this log, and return it.

        None where it has been taken, has ended, or has imported with other variables than these: it is ended then. Its
        standard input must stay open as long as it is to live.
        """
        process, self._process = self._process, None
        if process is None:
            return None
        if _read_at_once(environment) == _read_at_once(self._environment) and process.poll() is None:
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps([dict(environment), str(log)]).encode() + b"\n")
                process.stdin.flush()
            except OSError:  # it has just ended
                pass
            else:
                return process
        _end(process)
        return None

    def close(self) -> None:
        """End the process unless it has been taken."""
        process, self._process = self._process, None
        if process is not None:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _read_at_once(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith(OWN)}


def main() -> None:
    """Import, and be a worker as soon as the launcher says which. Raises SystemExit with its exit code."""
    use_private_umask()
    told = bytearray()

    def listen() -> None:
        while not told.endswith(b"\n"):
            got = os.read(0, 1)  # not more than the line: what follows is the lifeline's
            if not got:
                os._exit(0)
            told.extend(got)

    listening = threading.Thread(target=listen, name="ahead", daemon=True)
    listening.start()
    with importing():
        importlib.import_module("lorafleet.serve")
        try:
            importlib.import_module("gpu_worker.light_imports").import_torch()
            importlib.import_module("gpu_worker.service.service")
        except ImportError:  # `lorafleet serve` says what is not installed
            pass
    listening.join()
    environment, log = json.loads(told)
    os.environ.update(environment)
    os.environ[lifeline.VARIABLE] = "1"
    opened = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(opened, stream)
    os.close(opened)
    runpy.run_module("lorafleet", run_name="__main__")  # with this process's arguments, which are a service's


if __name__ == "__main__":
    main()
