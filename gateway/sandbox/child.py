"""The sandbox's process: renders templates, compiles grammars, and can do nothing else.

Reads jobs from standard input and writes answers to standard output, each as four bytes of length and MessagePack. A
first byte says that it is ready: all that it needs is imported and open, and what it does not need is taken away.
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
"""A process that has grown by so much makes place for a new one, so that no job pays for those before it."""

MAX_ANSWER_BYTES = 16 << 20
MAX_REFUSAL = 1000  # characters
READY, READY_UNFILTERED = b"!", b"?"
"""The second: the kernel does not filter the process's system calls."""

SIZE_BYTES = 4
WITH_VOCABULARY = "with-vocabulary"
"""The process's last argument, if it is to read the base's vocabulary before its first job: up to a CPU second."""

ANY_TEXT = '{"grammars":[{"lark_grammar":"start: /(.|\\n)*/"}]}'

_EXCERPT = re.compile(r"\n *\d+ \| ")
"""Begins the lines of a grammar that the compiler shows after an error. One made of a schema is nothing to a client."""

NOTHING_FITS = "no text is of this form: it may refer to itself, or leave no choice"
"""What llguidance calls NoExtensionBias."""

IMPORTED_LATE = (
    "encodings.idna", "encodings.latin_1", "encodings.unicode_escape", "encodings.utf_16", "jinja2.constants",
    "jinja2.debug", "html", "llguidance", "pprint", "textwrap", "traceback", "unicodedata",
)  # fmt: skip
"""Modules that a job may need and that Python would import then, when no file can be opened any more."""


class Render(msgspec.Struct, tag=True):
    """A chat template that is to be rendered."""

    what: ClassVar[str] = "the adapter's chat template"  # in error messages

    source: str
    special_tokens: dict[str, str]
    messages: list[dict[str, Any]]
    add_generation_prompt: bool
    variables: dict[str, Any]
    continue_final: bool = False


class Check(msgspec.Struct, tag=True):
    """A grammar that is to be compiled for the base model's tokenizer."""

    what: ClassVar[str] = "compiling the output's grammar"

    grammar: str  # as in `messages.Body`


SandboxJob = Render | Check


class Answer(msgspec.Struct):
    """What came of a job."""

    text: str = ""
    refusal: str = ""  # what is wrong with the template, or the grammar
    worn: bool = False  # the process should make place for a new one


def framed(message: SandboxJob | Answer) -> bytes:
    """Return a message with its length before it."""
    payload = msgspec.msgpack.encode(message)
    return len(payload).to_bytes(SIZE_BYTES, "little") + payload


class SandboxWorker:
    """Does jobs, and remembers what they have in common."""

    def __init__(self, tokenizer_file: int | None, is_worn: Callable[[], bool]) -> None:
        """tokenizer_file: the base model's tokenizer.json, open. is_worn: whether the process has grown too large."""
        self._tokenizer_file = tokenizer_file
        self._is_worn = is_worn
        self._template = lru_cache(maxsize=64)(self._read_template)
        self._vocabulary = lru_cache(maxsize=1)(self._read_vocabulary)

    def answer(self, payload: bytes) -> bytes:
        """Return the framed answer to a job, whatever a stranger's code makes libraries raise."""
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
        except Exception as error:  # noqa: BLE001  the loop's edge
            message = _refusal(f"{what} failed: {type(error).__name__}: {error}", worn=True)
        except BaseException as error:  # noqa: BLE001  panics of native libraries, which may not work any more
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
            return LLTokenizer(file.read(), slices=[])  # without what makes many masks cheap: a check needs one


def _refusal(text: str, *, worn: bool = False) -> bytes:
    printable = text[:MAX_REFUSAL].encode(errors="backslashreplace").decode()
    return framed(Answer(refusal=printable, worn=worn))


def _read(num_bytes: int) -> bytes:
    """Return so many bytes of standard input, fewer where it ends."""
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

    parent: who started it. tokenizer: path of the base's, "" for none. with_vocabulary: whether it is read before the
    first job, which would otherwise pay for it if it is a grammar.
    """
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # what the gateway has open, where it leaks
    tokenizer_file = os.open(tokenizer, os.O_RDONLY) if tokenizer else None
    for name in IMPORTED_LATE:
        importlib.import_module(name)
    time.localtime()  # reads the time zone's file
    statm = os.open("/proc/self/statm", os.O_RDONLY)
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # where memory is short, the kernel ends this process first
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 2)  # the gateway's log is not for strangers to write
    is_filtered = lock_down(parent, MAX_MEMORY_BYTES)
    most_pages = int(os.pread(statm, 64, 0).split()[0]) + WORN_BYTES // resource.getpagesize()
    worker = SandboxWorker(tokenizer_file, lambda: int(os.pread(statm, 64, 0).split()[0]) > most_pages)
    if with_vocabulary:
        worker.answer(msgspec.msgpack.encode(Check(ANY_TEXT)))  # whatever comes of it, the next one is told again
    _write(READY if is_filtered else READY_UNFILTERED)
    while head := _read(SIZE_BYTES):
        _write(worker.answer(_read(int.from_bytes(head, "little"))))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:] == [WITH_VOCABULARY])
