"""The life of a service process: logging, signals, drain, exit code."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

import uvloop

from protocol.runtime.redaction import redact
from protocol.runtime.tracing import TRACE_ID
from protocol.runtime.watchdog import WATCHDOG

logger = logging.getLogger(__name__)

_PLAIN = logging.Formatter()

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) != "\t"}
_ESCAPES = _CONTROLS | {ord("\n"): "\\n", ord("\r"): "\\r", 0x2028: "\\u2028", 0x2029: "\\u2029"}
"""Replacements for characters that would end a line or control a terminal."""

_JSON_ESCAPES = {code: f"\\u{code:04x}" for code in (*range(0x7F, 0xA0), 0x2028, 0x2029)}
"""Replacements for characters that JSON may contain unescaped but some readers treat as the end of a line."""

YOUNG_OBJECTS = 10_000
"""New objects after which the garbage collector scans the youngest generation. Python's 700 are those of a few requests
in flight: scanning them repeatedly took a tenth of a gateway's time.
"""


class JsonLines(logging.Formatter):
    """Formats a log record as one line of JSON, for log collectors."""

    def __init__(self, service: str) -> None:
        """service: its name, written into every line."""
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if trace_id := TRACE_ID.get():
            line["trace_id"] = trace_id
        if record.exc_info or record.exc_text:  # a filter may have set the text
            line["exception"] = record.exc_text or self.formatException(record.exc_info or (None, None, None))
        return json.dumps(line, ensure_ascii=False).translate(_JSON_ESCAPES)


class TextLines(logging.Formatter):
    """Formats a log record as a line of text, with the trace of its request, if there is one.

    A message is one line even with untrusted content, and the lines of an exception are indented. So only a record's
    own line begins like one.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the record's line without its exception."""
        trace_id = TRACE_ID.get()
        text = super().formatMessage(record).translate(_ESCAPES)
        return f"{text} [trace {trace_id}]" if trace_id else text

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's line and the lines of its exception."""
        event, *more = super().format(record).split("\n")
        return "\n".join([event, *(f"    {line.translate(_ESCAPES)}" for line in more)])


class Redacting(logging.Filter):
    """Removes secrets from every record, its exception included, before it is formatted."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Redact the record in place; return True, to keep it."""
        record.msg, record.args = redact(record.getMessage()), None
        if record.exc_info:
            record.exc_text = redact(_PLAIN.formatException(record.exc_info))
        return True


def set_up_logging(service: str, level: str, form: str = "text") -> None:
    """Log one line per record to stderr, with time, level and service. form: "text" or "json"."""
    handler = logging.StreamHandler(sys.stderr)
    text = TextLines(f"%(asctime)s %(levelname).1s {service} %(name)s: %(message)s", "%H:%M:%S")
    handler.setFormatter(JsonLines(service) if form == "json" else text)
    handler.addFilter(Redacting())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it would log every request


def log_format() -> str:
    """Return the log format of this process, for a child that should use the same."""
    return "json" if any(isinstance(h.formatter, JsonLines) for h in logging.getLogger().handlers) else "text"


def run(main: Callable[[asyncio.Event], Awaitable[int]], *, sendfile: bool = False) -> int:
    """Run a service's `main(stop)` until it returns its exit code.

    The first SIGINT or SIGTERM sets `stop`, and the service drains. The second ends the process immediately.
    The loop is uvloop's, which needs half the CPU per event; with `sendfile` it is asyncio's, since uvloop lacks it.
    `WATCHDOG` ends a process that has stopped working, including one that does not end after `main`.
    """

    async def shell() -> int:
        stop = asyncio.Event()

        def on_signal() -> None:
            if stop.is_set():
                os._exit(130)
            stop.set()

        loop = asyncio.get_running_loop()
        for sig in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(sig, on_signal)
        WATCHDOG.wind()
        watch = loop.create_task(WATCHDOG.watch())
        try:
            return await main(stop)
        finally:
            watch.cancel()

    # Imported modules stay forever. Unless frozen, each full collection scans their 100,000 objects again and stops the
    # loop for 50 ms, on a busy core for 0.5 s.
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])
    with asyncio.Runner(loop_factory=None if sendfile else uvloop.new_event_loop) as runner:
        return runner.run(shell())


async def unending(work: Callable[[], Awaitable[object]], until: asyncio.Event | None = None) -> None:
    """Run a loop that ends only by cancellation, or once `until` is set. Raises RuntimeError if it ends otherwise.

    A task group treats a task that has returned, or was cancelled from within by a library, as finished: the process
    would live on without it.
    """
    try:
        await work()
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise RuntimeError(f"a loop was cancelled from within: {work}") from error
    if until is None or not until.is_set():
        raise RuntimeError(f"a loop has ended: {work}")


async def wait_any(event: asyncio.Event, timeout_s: float) -> bool:
    """Wait for `event`, at most `timeout_s`; return whether it is set. For loops, in place of a sleep."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return False
    return True
