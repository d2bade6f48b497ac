"""The sandbox's process: renders chat templates and compiles grammars, one after another, within a limit of memory.

Reads jobs from standard input and writes answers to standard output, each as four bytes of length and MessagePack. A
first byte says that it is ready.
"""

from __future__ import annotations

import os
import resource
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

from gateway.text.chat import ChatTemplate
from protocol.wire.errors import BadRequest

MAX_MEMORY_BYTES = 1 << 30
MAX_TEXT_BYTES = 16 << 20
READY = b"!"
SIZE_BYTES = 4


class Render(msgspec.Struct, tag=True):
    """A chat template that is to be rendered."""

    source: str
    special_tokens: dict[str, str]
    messages: list[dict[str, Any]]
    add_generation_prompt: bool
    variables: dict[str, Any]


class Check(msgspec.Struct, tag=True):
    """A grammar that is to be compiled."""

    grammar: str  # as in `messages.Body`
    tokenizer: str  # path of the base model's tokenizer.json


SandboxJob = Render | Check


class Answer(msgspec.Struct):
    """What came of a job."""

    text: str = ""
    refusal: str = ""  # what is wrong with the template, or the grammar


def framed(message: SandboxJob | Answer) -> bytes:
    """Return a message with its length before it."""
    payload = msgspec.msgpack.encode(message)
    return len(payload).to_bytes(SIZE_BYTES, "little") + payload


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
    from llguidance import LLTokenizer  # a process that only renders templates does not pay for the import

    return LLTokenizer(Path(path).read_text())


def _check(job: Check) -> Answer:
    from llguidance import LLMatcher

    matcher = LLMatcher(_vocabulary(job.tokenizer), job.grammar, log_level=0)
    matcher.compute_bitmask()
    return Answer(refusal=" ".join(matcher.get_error().split()))


def main() -> None:
    """Answer jobs until standard input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    source, sink = os.fdopen(0, "rb"), os.fdopen(1, "wb")
    sink.write(READY)
    sink.flush()
    while head := source.read(SIZE_BYTES):
        job = msgspec.msgpack.decode(source.read(int.from_bytes(head, "little")), type=SandboxJob)
        sink.write(framed(_render(job) if isinstance(job, Render) else _check(job)))
        sink.flush()


if __name__ == "__main__":
    main()
