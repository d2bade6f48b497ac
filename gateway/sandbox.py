"""Renders chat templates that adapters bring, in a process that can be killed.

Jinja's sandbox keeps a template from Python's objects, not from a loop without end or a text without limit. So what
strangers wrote is rendered apart from everybody else's requests, with a limit of time and of memory.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec

from gateway.chat import ChatTemplate
from protocol.errors import BadRequest, Unavailable

logger = logging.getLogger(__name__)

RENDER_S = 5.0
START_S = 30.0
MAX_MEMORY_BYTES = 1 << 30
MAX_TEXT_BYTES = 16 << 20


class Job(msgspec.Struct):
    source: str
    special_tokens: dict[str, str]
    messages: list[dict[str, Any]]
    add_generation_prompt: bool
    variables: dict[str, Any]


class Rendered(msgspec.Struct):
    text: str = ""
    refusal: str = ""  # why there is no text


class Sandbox:
    """One rendering process, started when it is needed and again when it had to be killed."""

    def __init__(self, render_s: float = RENDER_S) -> None:
        self._render_s = render_s
        self._lock = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    async def render(self, job: Job) -> str:
        """Return what a template makes of messages. Raises BadRequest with the template's words, or at its limits."""
        async with self._lock:
            process = await self._living()
            try:
                async with asyncio.timeout(self._render_s):
                    answer = await _ask(process, job)
            except TimeoutError:
                await self._kill()
                raise BadRequest(f"the adapter's chat template took longer than {self._render_s:g} s") from None
            except (OSError, asyncio.IncompleteReadError):
                await self._kill()
                raise BadRequest("the adapter's chat template ended its process: it wants too much memory") from None
            except BaseException:  # cancelled: its answer must not be taken for the next one's
                await self._kill()
                raise
        if answer.refusal:
            raise BadRequest(answer.refusal, param="messages")
        return answer.text

    async def close(self) -> None:
        """End the process."""
        async with self._lock:
            await self._kill()

    async def _living(self) -> asyncio.subprocess.Process:
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "gateway.sandbox", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                limit=MAX_TEXT_BYTES,
            )  # fmt: skip
            assert self._process.stdout is not None
            try:
                async with asyncio.timeout(START_S):
                    await self._process.stdout.readexactly(1)
            except (TimeoutError, asyncio.IncompleteReadError) as error:
                await self._kill()
                raise Unavailable("chat templates of adapters cannot be rendered: no process for it") from error
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
        job = Job(self.source, self.special_tokens, messages, add_generation_prompt, variables)
        return await self.sandbox.render(job)


async def _ask(process: asyncio.subprocess.Process, job: Job) -> Rendered:
    assert process.stdin is not None
    assert process.stdout is not None
    payload = msgspec.msgpack.encode(job)
    process.stdin.write(len(payload).to_bytes(4, "little") + payload)
    await process.stdin.drain()
    size = int.from_bytes(await process.stdout.readexactly(4), "little")
    return msgspec.msgpack.decode(await process.stdout.readexactly(size), type=Rendered)


# ---------------------------------------------------------------- in the process


@lru_cache(maxsize=64)
def _compiled(source: str, special_tokens: tuple[tuple[str, str], ...]) -> ChatTemplate:
    return ChatTemplate(source, dict(special_tokens))


def main() -> None:
    """Render what comes in, until nothing more does."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    source, sink = os.fdopen(0, "rb"), os.fdopen(1, "wb")
    sink.write(b"!")
    sink.flush()
    while head := source.read(4):
        job = msgspec.msgpack.decode(source.read(int.from_bytes(head, "little")), type=Job)
        try:
            template = _compiled(job.source, tuple(sorted(job.special_tokens.items())))
            text = template.render(
                job.messages, add_generation_prompt=job.add_generation_prompt, variables=job.variables
            )
            answer = Rendered(text) if len(text) <= MAX_TEXT_BYTES else Rendered(refusal="the prompt is too long")
        except BadRequest as error:
            answer = Rendered(refusal=error.message)
        except MemoryError:
            answer = Rendered(refusal=f"the chat template wants more than {MAX_MEMORY_BYTES} bytes")
        payload = msgspec.msgpack.encode(answer)
        sink.write(len(payload).to_bytes(4, "little") + payload)
        sink.flush()


if __name__ == "__main__":
    main()
