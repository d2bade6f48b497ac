"""The output of `lorafleet up`: a spinner per starting service, or lines without a terminal; then one line each."""

from __future__ import annotations

import time
from contextlib import suppress

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

MAX_ACTIVITY, MAX_LINE = 60, 200
"""Maximum characters of an activity beside a spinner, and in a line."""

REPEAT_S = 15.0
"""Seconds after which, without a terminal, a service's activity is printed again."""


class Screen:
    """Lines and spinners on standard output; only lines without a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        """console: default: standard output. Nothing is shown yet."""
        self.console = console or Console(highlight=False, soft_wrap=True)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self._progress = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self._rows: dict[str, TaskID] = {}
        self._shown: dict[str, tuple[str, float]] = {}
        self._since: dict[str, float] = {}

    def say(self, text: str) -> None:
        """Print a line of rich markup; do nothing if the terminal was closed, since the fleet still drains then."""
        with suppress(OSError):
            self.console.print(text)

    def starting(self, name: str, activity: str) -> None:
        """Show that a service is starting, and its current activity."""
        since_s = self._since.setdefault(name, time.monotonic())
        if not self.console.is_terminal:
            self._say_progress(name, activity, since_s)
            return
        text = f"{name:10} [dim]{escape(activity[:MAX_ACTIVITY])}[/]"
        if name in self._rows:
            self._progress.update(self._rows[name], description=text)
        else:
            self._progress.start()
            self._rows[name] = self._progress.add_task(text, total=None)

    def _say_progress(self, name: str, activity: str, since_s: float) -> None:
        """Print a service's activity as a line, when it changes and then every REPEAT_S."""
        now_s = time.monotonic()
        shown, at_s = self._shown.get(name, ("", since_s))
        if activity != shown or now_s - at_s >= REPEAT_S:
            self._shown[name] = activity, now_s
            self.say(f"  {name:10} {escape(activity[:MAX_LINE])} ({now_s - since_s:.0f} s)")

    def ready(self, name: str) -> None:
        """Replace the spinner of a service by a line."""
        if name in self._rows:
            self._progress.remove_task(self._rows.pop(name))
        seconds = time.monotonic() - self._since.pop(name, time.monotonic())
        self.say(f"[green]✓[/] {name:10} ready in {seconds:.1f} s")
        if not self._rows:
            self._progress.stop()

    def close(self) -> None:
        """Remove all spinners."""
        with suppress(OSError):
            self._progress.stop()
        self._rows.clear()
