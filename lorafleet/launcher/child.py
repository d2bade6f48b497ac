"""A service process that the launcher keeps running: its log, its restarts and its end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape

from lorafleet.launcher import lifeline
from protocol.queue.bus import now_ms
from protocol.runtime.service import wait_any
from protocol.wire.errors import LorafleetError
from protocol.wire.lines import lines_of

MAX_FAILED_STARTS = 3
STEADY_S = 30.0  # a process that was ready and ran this long has its backoff reset
FIRST_PAUSE_S, MAX_PAUSE_S = 0.5, 10.0
WRONG_USAGE = 2  # exit code for wrong settings, with which a restart would fail, too
TAIL_BYTES = 4000

MAX_LOG_BYTES = 64 << 20
"""Size at which a log is renamed to NAME.log.1, replacing an older one, and begins again."""

_LOG_LINE = re.compile(r"^\d\d:\d\d:\d\d ([DIWEC]) \S+ (?:\S+: )?(.*)$")


def _read_line(line: str) -> tuple[str, str]:
    """Return the level of a log line (D, I, W, E or C) and its message; ("", line) if no service wrote it."""
    if match := _LOG_LINE.match(line):
        return match[1], match[2]
    if line.startswith('{"time": '):
        try:
            entry = json.loads(line)
            return str(entry["level"])[:1].upper(), str(entry["message"])
        except (ValueError, LookupError, TypeError):  # another program's line, or a truncated one
            return "", line.strip()
    return "", line.strip()


class ServiceFailed(LorafleetError):
    """A service does not start; the message includes the end of its log."""


@dataclass(frozen=True, slots=True)
class Spec:
    """The command, environment and log of a service process."""

    service: str  # the argument of `lorafleet serve`
    name: str  # process name, such as "worker-0"
    command: tuple[str, ...]
    environment: dict[str, str]
    log: Path


class Child:
    """A service process and its replacements."""

    def __init__(
        self,
        spec: Spec,
        lifeline_fd: int,
        say: Callable[[str], None],
        first_pause_s: float = FIRST_PAUSE_S,
        max_log_bytes: int = MAX_LOG_BYTES,
    ) -> None:
        """Prepare without starting.

        lifeline_fd: becomes the standard input of the process. say: shows a line to the user. first_pause_s: seconds
        before the first restart; later pauses double. max_log_bytes: size at which the log begins again.
        """
        self.spec = spec
        self.ready = asyncio.Event()  # set from outside, cleared when the process ends
        self.started_ms = 0  # unix time of the latest start
        self.activity = "starting"  # last message of its log
        self._lifeline_fd = lifeline_fd
        self._say = say
        self._first_pause_s = first_pause_s
        self._stopping = asyncio.Event()
        self._ended = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._log_offset = 0
        self._max_log_bytes = max_log_bytes
        spec.log.touch()

    async def supervise(self) -> None:
        """Run the process until `stop`, and restart it whenever it ends by itself.

        Raises ServiceFailed if it was never ready and its settings are wrong, or it has ended MAX_FAILED_STARTS times.
        """
        name, failed, pause_s, proven = self.spec.name, 0, self._first_pause_s, False
        try:
            while not self._stopping.is_set():
                started = time.monotonic()
                code = await self._run_once()
                was_ready = self.ready.is_set()
                self.ready.clear()
                self.follow_log()
                if self._stopping.is_set():
                    return
                proven = proven or was_ready
                failed += 1
                if not proven and (code == WRONG_USAGE or failed == MAX_FAILED_STARTS):
                    raise ServiceFailed(f"{name} did not start ({_ending(code)}); end of its log:\n{self.log_tail()}")
                if was_ready and time.monotonic() - started > STEADY_S:
                    pause_s = self._first_pause_s
                self._say(f"[yellow]{name}[/] {_ending(code)}; restarting it in {pause_s:g} s")
                await wait_any(self._stopping, pause_s)
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
        finally:
            self._ended.set()

    async def stop(self, grace_s: float) -> None:
        """Ask the process to drain, kill it after `grace_s` seconds, and return when it has ended."""
        self._stopping.set()
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
        if not await wait_any(self._ended, grace_s):
            self._say(f"[yellow]{self.spec.name}[/] did not drain within {grace_s:g} s; killing it")
            self.kill()
            await self._ended.wait()

    def kill(self) -> None:
        """Kill the process and its process group, without a restart."""
        self._stopping.set()
        if self._process is not None:
            _kill_group(self._process.pid)

    def follow_log(self) -> None:
        """Read the new lines of the log: show warnings to the user, and set `activity` to the last message.

        At `max_log_bytes`, the log begins again.
        """
        with self.spec.log.open("rb") as log:
            log.seek(self._log_offset)
            gained = log.read()
        whole, newline, _ = gained.replace(b"\r", b"\n").rpartition(b"\n")
        self._log_offset += len(whole) + len(newline)
        for line in lines_of(whole.decode(errors="replace")):
            level, text = _read_line(line)
            self.activity = text or self.activity
            if level in ("W", "E", "C"):
                self._say(f"[yellow]{self.spec.name}[/] {escape(text)}")
        if self._log_offset >= self._max_log_bytes:
            self._rotate_log()

    def _rotate_log(self) -> None:
        """Copy the log and truncate it; the process has the file open, so renaming would not redirect it.

        A line written between the two steps is lost. On a full disk there is no copy.
        """
        log, older = self.spec.log, self.spec.log.with_name(f"{self.spec.log.name}.1")
        try:
            shutil.copyfile(log, older)
        except OSError as error:
            with suppress(OSError):
                older.unlink()
            self._say(
                f"[yellow]{self.spec.name}[/] its log was truncated and could not be rotated: {escape(str(error))}"
            )
        os.truncate(log, 0)
        self._log_offset = 0

    def log_tail(self) -> str:
        """Return the last lines of the log."""
        with self.spec.log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = lines_of(log.read().decode(errors="replace"))
        return "\n".join(f"  {line}" for line in lines[-15:])

    async def _run_once(self) -> int:
        self.started_ms = now_ms()
        with self.spec.log.open("ab") as log:
            # In its own session, the process does not get the terminal's Ctrl-C, and its whole group can be killed.
            self._process = await asyncio.create_subprocess_exec(
                *self.spec.command,
                stdin=self._lifeline_fd,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**self.spec.environment, lifeline.VARIABLE: "1"},
            )
        if self._stopping.is_set():  # `stop` was called during the start
            self._process.send_signal(signal.SIGTERM)
        try:
            return await self._process.wait()
        finally:
            _kill_group(self._process.pid)  # children that it may have left


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _ending(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
