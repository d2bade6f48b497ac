"""Runs what strangers wrote, chat templates of adapters and grammars of clients, in a process that can be killed.

Jinja's sandbox keeps a template from Python's objects, not from an endless loop or a text without limit, and a grammar
of a few lines may take minutes to compile. The process, `sandbox_child`, keeps their time and memory apart from
everybody else's requests.
"""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import dataclass
from typing import Any

import msgspec

from gateway.text.sandbox_child import MAX_TEXT_BYTES, READY, SIZE_BYTES, Answer, Render, SandboxJob, framed
from protocol.wire.errors import BadRequest, Unavailable

RENDER_S = 5.0
START_S = 30.0
ONE_THREAD = {"RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Each thread would reserve memory that counts against the limit, on a machine with many cores all of it."""


class Sandbox:
    """One process for what strangers wrote, started when it is needed, and again after it had to be killed."""

    def __init__(self, limit_s: float = RENDER_S, what: str = "the adapter's chat template") -> None:
        """limit_s: most seconds of one job. what: names the job in error messages."""
        self._limit_s = limit_s
        self._what = what
        self._lock = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """Id of the process; None while there is none."""
        return None if self._process is None else self._process.pid

    async def do(self, job: SandboxJob) -> Answer:
        """Return what came of a job. Raises BadRequest at its limits, Unavailable without a process."""
        async with self._lock:
            process = await self._started()
            try:
                async with asyncio.timeout(self._limit_s):
                    return await _ask(process, job)
            except TimeoutError:
                await self._kill()
                raise BadRequest(f"{self._what} took longer than {self._limit_s:g} s") from None
            except (OSError, asyncio.IncompleteReadError):
                await self._kill()
                raise BadRequest(f"{self._what} ended its process: it wants too much memory") from None
            except BaseException:  # cancelled: its answer must not be taken for the next one's
                await self._kill()
                raise

    async def render(self, job: Render) -> str:
        """Return what a template makes of messages. Raises as `do`, and BadRequest with the template's words."""
        answer = await self.do(job)
        if answer.refusal:
            raise BadRequest(answer.refusal, param="messages")
        return answer.text

    async def close(self) -> None:
        """End the process."""
        async with self._lock:
            await self._kill()

    async def _started(self) -> asyncio.subprocess.Process:
        """Return the process, started and ready. Raises Unavailable."""
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "gateway.text.sandbox_child",
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                limit=MAX_TEXT_BYTES, env={**os.environ, **ONE_THREAD},
            )  # fmt: skip
            assert self._process.stdout is not None
            try:
                async with asyncio.timeout(START_S):
                    await self._process.stdout.readexactly(len(READY))
            except (TimeoutError, asyncio.IncompleteReadError) as error:
                await self._kill()
                raise Unavailable(f"there is no process for {self._what}") from error
            except BaseException:  # cancelled: the next job would read this byte as a part of its answer
                await self._kill()
                raise
        return self._process

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.wait()


@dataclass(frozen=True, slots=True)
class SandboxedTemplate:
    """A chat template that is only ever compiled and rendered in the sandbox."""

    source: str
    special_tokens: dict[str, str]
    sandbox: Sandbox

    async def render(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool, variables: dict[str, Any]
    ) -> str:
        """Return the prompt of normalized messages. Raises as `Sandbox.render`."""
        job = Render(self.source, self.special_tokens, messages, add_generation_prompt, variables)
        return await self.sandbox.render(job)


async def _ask(process: asyncio.subprocess.Process, job: SandboxJob) -> Answer:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(framed(job))
    await process.stdin.drain()
    size = int.from_bytes(await process.stdout.readexactly(SIZE_BYTES), "little")
    return msgspec.msgpack.decode(await process.stdout.readexactly(size), type=Answer)
