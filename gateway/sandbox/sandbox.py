"""Runs untrusted code, adapters' chat templates and clients' grammars, in processes that can be killed.

Jinja's sandbox protects Python's objects, but does not stop an endless loop or unlimited output; and a grammar of a few
lines may take minutes to compile. The processes (`child`) have their own limits of time and memory, and no access to
anything else (`lockdown`). `turns` orders the jobs; `process` is the gateway's side of one process.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.sandbox.child import WITH_VOCABULARY, Answer, Check, Render, SandboxJob, framed
from gateway.sandbox.process import START_S, QueuedJob, SandboxProcess
from gateway.sandbox.turns import Turns
from protocol.wire.errors import BadRequest, LorafleetError, Unavailable

logger = logging.getLogger(__name__)

TEMPLATE_S = 5.0
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.5, 30.0
"""Seconds without a new start after a failed one: initially, and at most."""

GROW_S = 0.1
"""How long jobs wait for running processes before another is started: most jobs take a few ms, a start 0.3 s of CPU."""

WARM_AFTER_S = 10.0
"""Seconds after a gateway's start at which it starts a first process, of 90 MB. Otherwise the first grammar, or the
first call with tools, would wait 0.5 s for one, and decode steps on the same cores would take longer meanwhile."""

COMMAND = (sys.executable, "-s", "-P", "-m", "gateway.sandbox.child")


class SandboxPool:
    """A few processes for untrusted code, started on demand and shared fairly by tenants."""

    def __init__(
        self,
        num_processes: int = 2,
        tokenizer: str = "",
        on_wait: Callable[[], object] = lambda: None,
        command: Sequence[str] = COMMAND,
        start_s: float = START_S,
        template_s: float = TEMPLATE_S,
    ) -> None:
        """tokenizer: path of the base model's tokenizer.json, for grammars. on_wait: called in a task that must wait.

        command: starts a process; the gateway's process id, `tokenizer` and possibly WITH_VOCABULARY are appended.
        start_s: maximum seconds until it is ready. template_s: maximum CPU seconds of a template.
        """
        self._num_processes = num_processes
        self.on_wait = on_wait
        self._command = (*command, str(os.getpid()), tokenizer)
        self._had_grammars = False
        self._start_s = start_s
        self._template_s = template_s
        self._turns: Turns[QueuedJob] = Turns(num_processes)
        self._processes: set[SandboxProcess] = set()  # from before their start until their exit
        self._idle: list[SandboxProcess] = []  # used as a stack: the latest has the warmest caches
        self._starts: set[asyncio.Task[None]] = set()
        self._growth: asyncio.TimerHandle | None = None  # set while jobs wait for running processes
        self._warm: asyncio.TimerHandle | None = None
        self._num_failed = 0  # failed starts since the last success
        self._retry_s = 0.0  # monotonic time before which none is started
        self._warned = False
        self._closed = False

    @property
    def pids(self) -> list[int]:
        """Ids of the running processes."""
        return [process.pid for process in self._processes if process.pid]

    async def do(self, job: SandboxJob, *, tenant: str, limit_s: float | None = None) -> Answer:
        """Return the answer to a job. limit_s: its maximum CPU seconds, None for a template's.

        Raises BadRequest if the job itself fails, Overloaded at its tenant's limits, and Unavailable without a process
        or on a machine that is too busy.
        """
        try:
            payload = framed(job)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise BadRequest(f"{job.what} cannot be given these values: {error}") from error
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        mine = QueuedJob(
            tenant, len(payload), job.what, self._template_s if limit_s is None else limit_s, payload, answer
        )
        self._turns.add(mine, time.monotonic())
        self._had_grammars |= isinstance(job, Check)
        self._dispatch()
        if mine in self._turns:
            self.on_wait()
        try:
            return await answer
        finally:
            self._turns.remove(mine)

    async def render(self, job: Render, *, tenant: str) -> str:
        """Return the text rendered from messages. Raises as `do`, and BadRequest with the template's own error."""
        answer = await self.do(job, tenant=tenant)
        if answer.refusal:
            raise BadRequest(answer.refusal, param="messages")
        return answer.text

    def warm_up(self, after_s: float = WARM_AFTER_S) -> None:
        """Start a process after some seconds, so that the first job finds one."""
        self._warm = asyncio.get_running_loop().call_later(after_s, self._start_first)

    async def close(self) -> None:
        """End the processes. Waiting and running jobs fail with Unavailable."""
        self._closed = True
        for timer in (self._growth, self._warm):
            if timer is not None:
                timer.cancel()
        self._dispatch()
        await asyncio.gather(*self._starts)
        for process in list(self._processes):
            process.end(_closing())
            if process.pid:
                await process.gone.wait()

    # ------------------------------------------------------------ dispatch

    def _dispatch(self) -> None:
        """Give jobs to idle processes, and start processes for the remaining jobs."""
        if self._closed:
            self._fail_waiting(_closing())
        while self._idle:
            if not self._idle[-1].is_idle:  # it has ended in the meantime
                self._idle.pop()
            elif (job := self._turns.next(time.monotonic())) is not None:
                self._idle.pop().begin(job)
            else:
                return
        self._start_more()

    def _start_more(self, *, is_overdue: bool = False) -> None:
        """Start a process if jobs wait: one at a time, and if others run, only after `GROW_S`."""
        is_starting = any(not process.was_ready for process in self._processes)
        is_full = len(self._processes) >= self._num_processes
        if is_starting or is_full or self._growth is not None or not self._turns.has_ready:
            return
        wait_s = self._retry_s - time.monotonic()
        if wait_s > 0:
            if not self._processes:
                self._fail_waiting(_no_process(wait_s))
            return
        if self._processes and not is_overdue:
            self._growth = asyncio.get_running_loop().call_later(GROW_S, self._grow)
            return
        self._start_one()

    def _start_one(self) -> None:
        process = SandboxProcess(self._ready, self._done, self._gone, self._start_s)
        self._processes.add(process)
        start = asyncio.get_running_loop().create_task(self._start(process))
        self._starts.add(start)
        start.add_done_callback(self._starts.discard)

    def _start_first(self) -> None:
        """Start a process with the base's vocabulary, unless some job was earlier."""
        if not self._processes and self._retry_s <= time.monotonic():
            self._had_grammars = True
            self._start_one()

    def _grow(self) -> None:
        self._growth = None
        self._start_more(is_overdue=True)

    async def _start(self, process: SandboxProcess) -> None:
        try:
            await process.start((*self._command, WITH_VOCABULARY) if self._had_grammars else self._command)
        except OSError as error:
            logger.warning("sandbox process: %s", error)

    def _ready(self, process: SandboxProcess) -> None:
        """Take a process that has become idle."""
        self._num_failed = 0
        if not process.is_filtered and not self._warned:
            self._warned = True
            logger.warning(
                "the kernel does not filter system calls (seccomp): adapters' templates run with resource limits alone"
            )
        self._idle.append(process)
        self._dispatch()

    def _done(self, job: QueuedJob, cost_s: float) -> None:
        self._turns.ended(job, cost_s, time.monotonic())

    def _gone(self, process: SandboxProcess) -> None:
        self._processes.discard(process)
        if not process.was_ready and not self._closed:
            wait_s = min(MAX_BACKOFF_S, MIN_BACKOFF_S * 2 ** min(self._num_failed, 10))
            self._num_failed += 1
            self._retry_s = time.monotonic() + wait_s
            logger.error("a sandbox process did not start; the next attempt is in %g s", wait_s)
        self._dispatch()

    def _fail_waiting(self, error: LorafleetError) -> None:
        for job in self._turns.clear():
            job.fail(error)


def _closing() -> Unavailable:
    return Unavailable("this gateway is shutting down", code="shutting_down")


def _no_process(wait_s: float) -> Unavailable:
    error = Unavailable("no sandbox process for templates and grammars could be started", code="no_sandbox")
    error.retry_after_s = max(1.0, wait_s)
    return error


@dataclass(frozen=True, slots=True)
class SandboxedTemplate:
    """A chat template that is compiled and rendered only in the sandbox."""

    source: str
    special_tokens: dict[str, str]
    sandbox: SandboxPool

    async def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final: bool,
        variables: dict[str, Any],
        tenant: str,
    ) -> str:
        """Return the prompt rendered from normalized messages, as `ChatTemplate.render`.

        Raises as `SandboxPool.render`.
        """
        job = Render(self.source, self.special_tokens, messages, add_generation_prompt, variables, continue_final)
        return await self.sandbox.render(job, tenant=tenant)
