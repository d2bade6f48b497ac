"""Renders chat templates that adapters bring, and compiles grammars that clients send, in processes that can be killed.

Jinja's sandbox keeps a template from Python's objects, not from a loop without end or a text without limit, and a
grammar of a few lines may take minutes to compile. So what strangers wrote is looked at apart from everybody else's
requests, with a limit of time and of memory.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from gateway.text.chat import ChatTemplate
from protocol.wire.errors import BadRequest, Unavailable

logger = logging.getLogger(__name__)

RENDER_S = 5.0
START_S = 30.0
MAX_MEMORY_BYTES = 1 << 30
MAX_TEXT_BYTES = 16 << 20
ONE_THREAD = {"RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Each thread would reserve memory that counts against the limit, on a machine with many cores all of it."""


class Render(msgspec.Struct, tag=True):
    """A chat template is to be rendered."""

    source: str
    special_tokens: dict[str, str]
    messages: list[dict[str, Any]]
    add_generation_prompt: bool
    variables: dict[str, Any]


class Check(msgspec.Struct, tag=True):
    """A grammar is to be compiled."""

    grammar: str  # as in `messages.Body`
    tokenizer: str  # path of the base model's tokenizer.json


Job = Render | Check


class Answer(msgspec.Struct):
    text: str = ""
    refusal: str = ""  # what is wrong with the template, or the grammar


class Sandbox:
    """One process for what strangers wrote, started when it is needed and again when it had to be killed."""

    def __init__(self, limit_s: float = RENDER_S, what: str = "the adapter's chat template") -> None:
        """what: is done in it, for messages."""
        self._limit_s = limit_s
        self._what = what
        self._lock = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    async def do(self, job: Job) -> Answer:
        """Return what came of a job. Raises BadRequest at its limits."""
        async with self._lock:
            process = await self._living()
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
        """Return what a template makes of messages. Raises BadRequest with the template's words, or at its limits."""
        answer = await self.do(job)
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
                sys.executable, "-m", "gateway.text.sandbox",
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                limit=MAX_TEXT_BYTES, env={**os.environ, **ONE_THREAD},
            )  # fmt: skip
            assert self._process.stdout is not None
            try:
                async with asyncio.timeout(START_S):
                    await self._process.stdout.readexactly(1)
            except (TimeoutError, asyncio.IncompleteReadError) as error:
                await self._kill()
                raise Unavailable(f"there is no process for {self._what}") from error
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


async def _ask(process: asyncio.subprocess.Process, job: Job) -> Answer:
    assert process.stdin is not None
    assert process.stdout is not None
    payload = msgspec.msgpack.encode(job)
    process.stdin.write(len(payload).to_bytes(4, "little") + payload)
    await process.stdin.drain()
    size = int.from_bytes(await process.stdout.readexactly(4), "little")
    return msgspec.msgpack.decode(await process.stdout.readexactly(size), type=Answer)


# ---------------------------------------------------------------- in the process


@lru_cache(maxsize=64)
def _compiled(source: str, special_tokens: tuple[tuple[str, str], ...]) -> ChatTemplate:
    return ChatTemplate(source, dict(special_tokens))


def _render(job: Render) -> Answer:
    try:
        template = _compiled(job.source, tuple(sorted(job.special_tokens.items())))
        text = template.render(job.messages, add_generation_prompt=job.add_generation_prompt, variables=job.variables)
    except BadRequest as error:
        return Answer(refusal=error.message)
    except MemoryError:
        return Answer(refusal=f"the chat template wants more than {MAX_MEMORY_BYTES} bytes")
    return Answer(text) if len(text) <= MAX_TEXT_BYTES else Answer(refusal="the prompt is too long")


@lru_cache(maxsize=1)
def _vocabulary(path: str) -> Any:
    from llguidance import LLTokenizer  # only those that compile grammars pay for it

    return LLTokenizer(Path(path).read_text())


def _check(job: Check) -> Answer:
    from llguidance import LLMatcher

    matcher = LLMatcher(_vocabulary(job.tokenizer), job.grammar, log_level=0)
    matcher.compute_bitmask()
    return Answer(refusal=" ".join(matcher.get_error().split()))


def main() -> None:
    """Do what comes in, until nothing more does."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    source, sink = os.fdopen(0, "rb"), os.fdopen(1, "wb")
    sink.write(b"!")
    sink.flush()
    while head := source.read(4):
        job = msgspec.msgpack.decode(source.read(int.from_bytes(head, "little")), type=Job)
        payload = msgspec.msgpack.encode(_render(job) if isinstance(job, Render) else _check(job))
        sink.write(len(payload).to_bytes(4, "little") + payload)
        sink.flush()


if __name__ == "__main__":
    main()
