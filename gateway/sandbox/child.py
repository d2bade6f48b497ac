"""The sandbox's process: renders templates and compiles grammars, without access to anything else.

Reads jobs from standard input and writes answers to standard output, each a four-byte length and MessagePack. A first
byte reports readiness: all modules and files are loaded, and privileges are dropped.
"""

from __future__ import annotations

import importlib
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any, ClassVar

import msgspec

from gateway.chat.template import ChatTemplate
from gateway.sandbox.lockdown import lock_down
from protocol.wire.errors import BadRequest
from protocol.wire.grammar_limits import GRAMMAR_LIMITS

MAX_MEMORY_BYTES = 1 << 30
WORN_BYTES = MAX_MEMORY_BYTES // 2
"""A process whose memory grew by this much is replaced, so that no job runs short because of earlier ones."""

MAX_ANSWER_BYTES = 16 << 20
MAX_REFUSAL = 1000  # characters
READY, READY_UNFILTERED = b"!", b"?"
"""READY_UNFILTERED: the kernel does not filter the process's system calls."""

SIZE_BYTES = 4
WITH_VOCABULARY = "with-vocabulary"
"""The process's last argument if it must read the base's vocabulary before its first job: up to one CPU second."""

ANY_TEXT = '{"grammars":[{"lark_grammar":"start: /(.|\\n)*/"}]}'

_EXCERPT = re.compile(r"\n *\d+ \| ")
"""Matches the start of the grammar lines that follow a compiler's error. For a grammar made from a schema they mean
nothing to a client."""

NOTHING_FITS = "no text is of this form: it may refer to itself, or leave no choice"
"""The message for llguidance's NoExtensionBias."""

IMPORTED_LATE = (
    "encodings.idna", "encodings.latin_1", "encodings.unicode_escape", "encodings.utf_16", "jinja2.constants",
    "jinja2.debug", "html", "llguidance", "pprint", "textwrap", "traceback", "unicodedata",
)  # fmt: skip
"""Modules that Python would import during a job, when files can no longer be opened."""


class Render(msgspec.Struct, tag=True):
    """A job: render a chat template."""

    what: ClassVar[str] = "the adapter's chat template"  # in error messages

    source: str
    special_tokens: dict[str, str]
    messages: list[dict[str, Any]]
    add_generation_prompt: bool
    variables: dict[str, Any]
    continue_final: bool = False


class Check(msgspec.Struct, tag=True):
    """A job: compile a grammar for the base model's tokenizer."""

    what: ClassVar[str] = "compiling the output's grammar"

    grammar: str  # as in `messages.Body`


SandboxJob = Render | Check


class Answer(msgspec.Struct):
    """The result of a job."""

    text: str = ""
    refusal: str = ""  # error of the template or grammar
    worn: bool = False  # the process should be replaced


def framed(message: SandboxJob | Answer) -> bytes:
    """Return a message with its length prefix."""
    payload = msgspec.msgpack.encode(message)
    return len(payload).to_bytes(SIZE_BYTES, "little") + payload


class SandboxWorker:
    """Runs jobs, and caches templates and the vocabulary."""

    def __init__(self, tokenizer_file: int | None, is_worn: Callable[[], bool]) -> None:
        """tokenizer_file: descriptor of the base model's tokenizer.json.

        is_worn: whether the process has grown too large.
        """
        self._tokenizer_file = tokenizer_file
        self._is_worn = is_worn
        self._template = lru_cache(maxsize=64)(self._read_template)
        self._vocabulary = lru_cache(maxsize=1)(self._read_vocabulary)

    def answer(self, payload: bytes) -> bytes:
        """Return the framed answer to a job; any exception becomes a refusal."""
        what = "a job"
        try:
            job = msgspec.msgpack.decode(payload, type=SandboxJob)
            what = job.what
            answer = self._render(job) if isinstance(job, Render) else self._check(job)
            answer.worn = self._is_worn()
            message = framed(answer)
        except BadRequest as error:
            message = _refusal(error.message)
        except MemoryError:
            message = _refusal(f"{what} wants more than {MAX_MEMORY_BYTES} bytes", worn=True)
        except Exception as error:  # noqa: BLE001  untrusted code may raise anything
            message = _refusal(f"{what} failed: {type(error).__name__}: {error}", worn=True)
        except BaseException as error:  # noqa: BLE001  panics of native libraries, which may be broken afterwards
            message = _refusal(f"{what} failed: {error}", worn=True)
        if len(message) > SIZE_BYTES + MAX_ANSWER_BYTES:
            message = _refusal(f"{what} makes {len(message)} bytes; the limit is {MAX_ANSWER_BYTES}")
        return message

    def _render(self, job: Render) -> Answer:
        template = self._template(job.source, tuple(sorted(job.special_tokens.items())))
        return Answer(
            template.render(
                job.messages,
                add_generation_prompt=job.add_generation_prompt,
                continue_final=job.continue_final,
                variables=job.variables,
            )
        )

    def _read_template(self, source: str, special_tokens: tuple[tuple[str, str], ...]) -> ChatTemplate:
        return ChatTemplate(source, dict(special_tokens))

    def _check(self, job: Check) -> Answer:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(**GRAMMAR_LIMITS, verbose_errors=False)
        matcher = LLMatcher(self._vocabulary(), job.grammar, log_level=0, limits=limits)
        matcher.compute_bitmask()
        error = " ".join(_EXCERPT.split(matcher.get_error()[:MAX_REFUSAL])[0].split())
        return Answer(refusal=NOTHING_FITS if error.startswith("NoExtensionBias") else error)

    def _read_vocabulary(self) -> Any:
        from llguidance import LLTokenizer

        if self._tokenizer_file is None:
            raise BadRequest("this model has no tokenizer.json")
        with open(self._tokenizer_file, encoding="utf-8", closefd=False) as file:
            file.seek(0)  # an earlier job may have run out of memory while it read
            return LLTokenizer(file.read(), slices=[])  # no slices: they speed up many masks, a check needs one


def _refusal(text: str, *, worn: bool = False) -> bytes:
    printable = text[:MAX_REFUSAL].encode(errors="backslashreplace").decode()
    return framed(Answer(refusal=printable, worn=worn))


def _read(num_bytes: int) -> bytes:
    """Return `num_bytes` bytes of standard input, fewer at its end."""
    found = bytearray()
    while len(found) < num_bytes and (more := os.read(0, num_bytes - len(found))):
        found += more
    return bytes(found)


def _write(data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(1, rest) :]


def main(parent: int, tokenizer: str, with_vocabulary: bool) -> None:
    """Answer jobs until standard input ends.

    parent: process id of the gateway. tokenizer: path of the base's tokenizer.json, "" for none. with_vocabulary: read
    it before the first job, so that no grammar's CPU limit pays for it.
    """
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # descriptors leaked by the gateway
    tokenizer_file = os.open(tokenizer, os.O_RDONLY) if tokenizer else None
    for name in IMPORTED_LATE:
        importlib.import_module(name)
    time.localtime()  # reads the time zone's file
    statm = os.open("/proc/self/statm", os.O_RDONLY)
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # the OOM killer picks this process first
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 2)  # untrusted code must not write into the gateway's log
    is_filtered = lock_down(parent, MAX_MEMORY_BYTES)
    most_pages = int(os.pread(statm, 64, 0).split()[0]) + WORN_BYTES // resource.getpagesize()
    worker = SandboxWorker(tokenizer_file, lambda: int(os.pread(statm, 64, 0).split()[0]) > most_pages)
    if with_vocabulary:
        worker.answer(msgspec.msgpack.encode(Check(ANY_TEXT)))  # an error is repeated for the next grammar
    _write(READY if is_filtered else READY_UNFILTERED)
    while head := _read(SIZE_BYTES):
        _write(worker.answer(_read(int.from_bytes(head, "little"))))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:] == [WITH_VOCABULARY])
