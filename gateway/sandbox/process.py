"""One process of the sandbox, as the gateway sees it: asked one job at a time, believed nothing.

A process that is idle has been asked nothing and has said nothing. Whatever it writes without being asked, or beyond
one answer of the right size and form, ends it. A job whose caller has gone runs to its end or its limit, so no answer
can be taken for the next one's, and clients that come and go cost no new processes.
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
"""A job that takes longer than `SLOW_S` gives way to everything else on the machine; hardly an honest one does."""

MIN_LOOK_S = 0.01
LAST_MOMENT_S = 0.1
"""How long a process that has closed its socket may take until it has ended: then how it ended is known."""

REAP_S = 0.005
"""How often it is asked whether a process has ended that is about to."""

KILLED_COST_S = 0.5
"""What a job that ends its process is charged for the next one's start."""

ENVIRONMENT = {
    "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    # Each thread would reserve memory that counts against the limit, on a machine with many cores all of it.
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
}
"""What is set for a process."""

PASSED_ON = ("LD_LIBRARY_PATH", "PYTHONHOME")
"""All that it sees of the gateway's environment, besides the time zone: where Python itself is."""


@dataclass(eq=False, slots=True)
class QueuedJob(SandboxTurn):
    """A job for a process, and who waits for its answer."""

    what: str  # names it in error messages
    limit_s: float  # of CPU time
    payload: bytes
    answer: asyncio.Future[Answer]

    @property
    def most_s(self) -> float:
        """Seconds after which it is given up, on a machine too busy to let it compute for `limit_s`."""
        return 2 * self.limit_s + 1

    def fail(self, error: LorafleetError) -> None:
        """Raise an error where the answer is waited for, if it still is."""
        if not self.answer.done():
            self.answer.set_exception(error)


class SandboxProcess(asyncio.Protocol):
    """A process that is started, does jobs, and ends."""

    def __init__(
        self,
        on_idle: Callable[[SandboxProcess], object],
        on_done: Callable[[QueuedJob, float], object],
        on_gone: Callable[[SandboxProcess], object],
        start_s: float = START_S,
    ) -> None:
        """Take what it tells. `start_s`: most seconds until it is ready.

        on_idle: it can do a job. on_done: a job has ended, and took so many CPU seconds. on_gone: it has ended.
        """
        self._on_idle = on_idle
        self._on_done = on_done
        self._on_gone = on_gone
        self._start_s = start_s
        self._loop = asyncio.get_running_loop()
        self._process: subprocess.Popen[bytes] | None = None
        self._transport: asyncio.Transport | None = None
        self._last_moment_s = 0.0  # the loop's time at which it is killed, if its socket is closed
        self._timer: asyncio.TimerHandle | None = None
        self._received = bytearray()
        self._job: QueuedJob | None = None
        self._begun_s = 0.0  # the loop's time
        self._cpu_before_s: float | None = None
        self._is_slow = False  # it gives way to everything else, for good
        self._is_ending = False
        self.was_ready = False
        self.is_filtered = False  # the kernel filters its system calls
        self.is_idle = False
        self.gone = asyncio.Event()

    @property
    def pid(self) -> int:
        """Its process id; 0 while it has none."""
        return self._process.pid if self._process is not None else 0

    async def start(self, command: Sequence[str]) -> None:
        """Start it: it will be idle or gone. Raises OSError."""
        # Where TZ is set, the C library does not look the zone's file up again.
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
        """Do a job; it must be idle."""
        assert self._transport is not None
        self._job, self.is_idle = job, False
        self._begun_s, self._cpu_before_s = self._loop.time(), self._cpu_s()
        if sys.platform == "linux" and self._cpu_before_s is not None:  # in case this loop does not turn in time
            most_s = math.ceil(self._cpu_before_s + job.limit_s) + 1
            with suppress(OSError):
                resource.prlimit(self.pid, resource.RLIMIT_CPU, (most_s, resource.RLIM_INFINITY))
        self._look_after(min(SLOW_S, job.limit_s), self._look)
        self._transport.write(job.payload)
        job.payload = b""

    def end(self, why: LorafleetError | None = None) -> None:
        """Kill it. why: what its job, if it has one, fails with."""
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
        """See how far the job is; it may have computed for `limit_s`, and is given up after `most_s`."""
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
        """Return the CPU seconds that it has used; None if it is gone, or the system does not tell."""
        if sys.platform == "linux":
            with suppress(OSError):
                return time.clock_gettime(~self.pid << 3 | 2)  # as clock_getcpuclockid makes it
        return None

    def _used_s(self) -> float:
        """Return the CPU seconds of its job, or the seconds that have passed where they are not known."""
        now_s, before_s = self._cpu_s(), self._cpu_before_s
        return self._loop.time() - self._begun_s if now_s is None or before_s is None else now_s - before_s

    # ------------------------------------------------------------ what it says

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note that it has been started."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        if self._is_ending:  # while it was being started
            self._transport.abort()
        else:
            self._look_after(self._start_s, self.end)

    def data_received(self, data: bytes) -> None:
        """Take what it writes."""
        if self._is_ending:
            return
        self._received += data
        if self._job is not None:
            self._read_answer(self._job)
        elif not self.was_ready and self._received in (READY, READY_UNFILTERED):
            self.was_ready, self.is_filtered = True, self._received == READY
            self._become_idle()
        else:
            self.end()  # nobody asked

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
        """Pass on what came of its job."""
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
        """Wait until it has ended, and end it if it does not: it listens and answers no more."""
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
        """Note that it has ended, or that it could not be started."""
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
    """Start a process that reads and writes a socket, within a millisecond. Raises OSError.

    Popen uses vfork. The event loop's `subprocess_exec`, of uvloop, forks: that stops a gateway of 600 MB for 40 ms.
    """
    return subprocess.Popen(command, stdin=socket_fd, stdout=socket_fd, env=environment)


def _ended_from_outside(job: QueuedJob) -> Unavailable:
    return Unavailable(f"the process for {job.what} has been ended", code="sandbox_ended")


def _garbage(job: QueuedJob) -> BadRequest:
    return BadRequest(f"{job.what} crashed or gave an unreadable answer")
