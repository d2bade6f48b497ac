"""The gateway's side of one sandbox process. It runs one job at a time; nothing it sends is trusted.

An idle process has no job and sends nothing. Output that is unsolicited, or is not one answer of valid size and form,
ends the process. A job whose caller has gone runs to its end or limit: so no answer is taken for the next job's, and
disconnecting clients cause no new processes.
"""

from __future__ import annotations

import asyncio
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec

from gateway.sandbox.child import (
    MAX_ANSWER_BYTES,
    MAX_MEMORY_BYTES,
    MAX_REFUSAL,
    READY,
    READY_UNFILTERED,
    SIZE_BYTES,
    Answer,
)
from gateway.sandbox.turns import SandboxTurn
from protocol.wire.errors import BadRequest, LorafleetError, Unavailable

START_S = 30.0

SLOW_S = 0.25
SLOW_NICENESS = 10
"""A process whose job takes more CPU time than `SLOW_S` gets this niceness; an honest job hardly takes that long."""

MIN_LOOK_S = 0.01
LAST_MOMENT_S = 0.1
"""Maximum seconds from the closing of a process's socket to its exit, so that its exit code is known."""

REAP_S = 0.005
"""Seconds between checks whether a process that is ending has exited."""

KILLED_COST_S = 0.5
"""CPU seconds charged to a job that ends its process, for the next one's start."""

ENVIRONMENT = {
    "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    # One thread each: threads reserve memory, on a machine with many cores all that the limit allows.
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
}
"""Environment variables of a process."""

PASSED_ON = ("LD_LIBRARY_PATH", "PYTHONHOME")
"""The only variables passed on from the gateway, besides the time zone: they locate Python."""


@dataclass(eq=False, slots=True)
class QueuedJob(SandboxTurn):
    """A job for a process, with the future of its answer."""

    what: str  # names it in error messages
    limit_s: float  # of CPU time
    payload: bytes
    answer: asyncio.Future[Answer]

    @property
    def most_s(self) -> float:
        """Wall-clock seconds after which the job is abandoned, if a busy machine denies it `limit_s` of CPU time."""
        return 2 * self.limit_s + 1

    def fail(self, error: LorafleetError) -> None:
        """Raise an error in the task that waits for the answer, if one still does."""
        if not self.answer.done():
            self.answer.set_exception(error)


class SandboxProcess(asyncio.Protocol):
    """A sandbox process from its start to its exit."""

    def __init__(
        self,
        on_idle: Callable[[SandboxProcess], object],
        on_done: Callable[[QueuedJob, float], object],
        on_gone: Callable[[SandboxProcess], object],
        start_s: float = START_S,
    ) -> None:
        """Store the callbacks. start_s: maximum seconds until the process is ready.

        on_idle: the process can take a job. on_done: a job has ended, with its CPU seconds. on_gone: the process has
        exited.
        """
        self._on_idle = on_idle
        self._on_done = on_done
        self._on_gone = on_gone
        self._start_s = start_s
        self._loop = asyncio.get_running_loop()
        self._process: subprocess.Popen[bytes] | None = None
        self._transport: asyncio.Transport | None = None
        self._last_moment_s = 0.0  # loop time at which it is killed after its socket was closed
        self._timer: asyncio.TimerHandle | None = None
        self._received = bytearray()
        self._job: QueuedJob | None = None
        self._begun_s = 0.0  # loop time
        self._cpu_before_s: float | None = None
        self._is_slow = False  # runs at `SLOW_NICENESS`, permanently
        self._is_ending = False
        self.was_ready = False
        self.is_filtered = False  # the kernel filters its system calls
        self.is_idle = False
        self.gone = asyncio.Event()

    @property
    def pid(self) -> int:
        """The process id; 0 before the start."""
        return self._process.pid if self._process is not None else 0

    async def start(self, command: Sequence[str]) -> None:
        """Start the process, which then becomes idle or exits. Raises OSError."""
        # With TZ set, the C library does not read the zone's file again.
        zone = os.environ.get("TZ", ":/etc/localtime")
        environment = {**ENVIRONMENT, "TZ": zone, **{key: os.environ[key] for key in PASSED_ON if key in os.environ}}
        mine, its = socket.socketpair()
        with its:
            try:
                self._process = _launched(command, its.fileno(), environment)
            except OSError:
                mine.close()
                self.connection_lost(None)
                raise
        await self._loop.create_unix_connection(lambda: self, sock=mine)

    def begin(self, job: QueuedJob) -> None:
        """Run a job on the process, which must be idle."""
        assert self._transport is not None
        self._job, self.is_idle = job, False
        self._begun_s, self._cpu_before_s = self._loop.time(), self._cpu_s()
        if sys.platform == "linux" and self._cpu_before_s is not None:  # in case the event loop is late
            most_s = math.ceil(self._cpu_before_s + job.limit_s) + 1
            with suppress(OSError):
                resource.prlimit(self.pid, resource.RLIMIT_CPU, (most_s, resource.RLIM_INFINITY))
        self._look_after(min(SLOW_S, job.limit_s), self._look)
        self._transport.write(job.payload)
        job.payload = b""

    def end(self, why: LorafleetError | None = None) -> None:
        """Kill the process. why: error of its job, if it has one."""
        if self._is_ending:
            return
        self._is_ending, self.is_idle = True, False
        if self._job is not None:
            self._settle(self._job, why or _ended_from_outside(self._job))
        if self._process is not None:
            self._process.kill()
        if self._transport is not None:
            self._transport.abort()

    # ------------------------------------------------------------ time

    def _look(self) -> None:
        """Check the job's progress, and kill the process after `limit_s` of CPU time or `most_s` of wall-clock time."""
        job = self._job
        if job is None:
            return
        used_s, elapsed_s = self._used_s(), self._loop.time() - self._begun_s
        if used_s >= job.limit_s:
            self.end(BadRequest(f"{job.what} took longer than {job.limit_s:g} s"))
        elif elapsed_s >= job.most_s:
            text = f"{job.what} was not done within {elapsed_s:.1f} s: this machine is too busy"
            self.end(Unavailable(text, code="sandbox_busy"))
        else:
            if used_s >= SLOW_S and not self._is_slow:
                self._is_slow = True
                with suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, self.pid, SLOW_NICENESS)
            left_s = min(job.limit_s - used_s, job.most_s - elapsed_s, math.inf if self._is_slow else SLOW_S - used_s)
            self._look_after(max(MIN_LOOK_S, left_s), self._look)

    def _look_after(self, delay_s: float, look: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(delay_s, look)

    def _cpu_s(self) -> float | None:
        """Return the CPU seconds used by the process; None if it has exited, or the system does not report them."""
        if sys.platform == "linux":
            with suppress(OSError):
                return time.clock_gettime(~self.pid << 3 | 2)  # as clock_getcpuclockid makes it
        return None

    def _used_s(self) -> float:
        """Return the CPU seconds of the current job; if unknown, its wall-clock seconds."""
        now_s, before_s = self._cpu_s(), self._cpu_before_s
        return self._loop.time() - self._begun_s if now_s is None or before_s is None else now_s - before_s

    # ------------------------------------------------------------ its output

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport, and start the timer for readiness."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transport has another base class
        if self._is_ending:  # while it was being started
            self._transport.abort()
        else:
            self._look_after(self._start_s, self.end)

    def data_received(self, data: bytes) -> None:
        """Process output: an answer, or the readiness byte. Anything else ends the process."""
        if self._is_ending:
            return
        self._received += data
        if self._job is not None:
            self._read_answer(self._job)
        elif not self.was_ready and self._received in (READY, READY_UNFILTERED):
            self.was_ready, self.is_filtered = True, self._received == READY
            self._become_idle()
        else:
            self.end()  # unsolicited output

    def _read_answer(self, job: QueuedJob) -> None:
        if len(self._received) < SIZE_BYTES:
            return
        whole = SIZE_BYTES + int.from_bytes(self._received[:SIZE_BYTES], "little")
        if whole > SIZE_BYTES + MAX_ANSWER_BYTES or len(self._received) > whole:
            self.end(_garbage(job))
            return
        if len(self._received) < whole:
            return
        try:
            answer = msgspec.msgpack.decode(self._received[SIZE_BYTES:], type=Answer)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            self.end(_garbage(job))
            return
        answer.refusal = answer.refusal[:MAX_REFUSAL]
        self._received.clear()
        self._settle(job, answer)
        if answer.worn or self._is_slow:
            self.end()
        else:
            self._become_idle()

    def _become_idle(self) -> None:
        self._received.clear()
        if self._timer is not None:
            self._timer.cancel()
        self.is_idle = True
        self._on_idle(self)

    def _settle(self, job: QueuedJob, outcome: Answer | LorafleetError) -> None:
        """Deliver the outcome of the job and report its CPU seconds."""
        self._job = None
        cost_s = self._used_s()
        if not isinstance(outcome, Answer):
            job.fail(outcome)
            cost_s += KILLED_COST_S
        elif not job.answer.done():
            job.answer.set_result(outcome)
        self._on_done(job, cost_s)

    # ------------------------------------------------------------ how it ends

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait until the process exits, and kill it if it does not: it can no longer answer."""
        self.is_idle = False
        self._last_moment_s = self._loop.time() + LAST_MOMENT_S
        self._reap()

    def _reap(self) -> None:
        if self._process is None or self._process.poll() is not None:
            self._leave()
            return
        if self._loop.time() >= self._last_moment_s:
            self._process.kill()
        self._look_after(REAP_S, self._reap)

    def _leave(self) -> None:
        """Clean up after the process has exited or could not be started."""
        self._is_ending = True
        if self._timer is not None:
            self._timer.cancel()
        if self._job is not None:
            self._settle(self._job, self._cause_of_death(self._job))
        self.gone.set()
        self._on_gone(self)

    def _cause_of_death(self, job: QueuedJob) -> LorafleetError:
        assert self._process is not None
        code = self._process.returncode
        if code == -signal.SIGXCPU:
            return BadRequest(f"{job.what} took longer than {job.limit_s:g} s")
        if code in (-signal.SIGKILL, -signal.SIGTERM):
            return _ended_from_outside(job)
        return BadRequest(f"{job.what} ended its process: it may want more than {MAX_MEMORY_BYTES} bytes of memory")


def _launched(command: Sequence[str], socket_fd: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a process whose standard input and output are a socket, within a millisecond. Raises OSError.

    Popen uses vfork. uvloop's `subprocess_exec` forks, which stops a gateway of 600 MB for 40 ms.
    """
    return subprocess.Popen(command, stdin=socket_fd, stdout=socket_fd, env=environment)


def _ended_from_outside(job: QueuedJob) -> Unavailable:
    return Unavailable(f"the process for {job.what} has been ended", code="sandbox_ended")


def _garbage(job: QueuedJob) -> BadRequest:
    return BadRequest(f"{job.what} crashed or gave an unreadable answer")
