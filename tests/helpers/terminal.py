"""A terminal of a given size (tmux), in which a test types like a user."""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Terminal:
    """A shell in a terminal."""

    server: str  # name of the tmux server

    def _tmux(self, *words: str) -> str:
        command = ["tmux", "-L", self.server, "-f", "/dev/null", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def screen(self) -> str:
        """Return the screen and its scrollback; folded lines are joined."""
        return self._tmux("capture-pane", "-p", "-J", "-S", "-", "-t", "0").rstrip()

    def type(self, text: str) -> None:
        """Type a line and press Enter."""
        self._tmux("send-keys", "-t", "0", "-l", "--", text)
        self._tmux("send-keys", "-t", "0", "Enter")

    def press(self, key: str) -> None:
        """Press a key, given by its tmux name, such as C-c."""
        self._tmux("send-keys", "-t", "0", key)

    def wait_for(self, *texts: str, times: int = 1) -> str:
        """Return the screen once it shows each of the texts at least `times` times."""
        end_s = time.monotonic() + WAIT_S
        while True:
            shown = self.screen()
            if all(shown.count(text) >= times for text in texts):
                return shown
            assert time.monotonic() < end_s, f"{texts} never came:\n{shown}"
            time.sleep(0.05)

    def clear(self) -> None:
        """Clear the screen and the scrollback."""
        mark = secrets.token_hex(4)
        self.type(f"clear; echo {mark[:4]}''{mark[4:]}")
        self.wait_for(mark)
        self._tmux("clear-history", "-t", "0")

    def run(self, command: str) -> tuple[str, int]:
        """Run a command; return its output and exit code."""
        self.clear()
        mark = secrets.token_hex(4)
        self.type(f"{command}; echo {mark[:4]}''{mark[4:]}=$?")
        shown = self.wait_for(f"{mark}=")
        printed, _, code = shown.rpartition(f"{mark}=")
        return printed.partition(f"{mark[:4]}''{mark[4:]}=$?")[2].strip("\n"), int(code.split()[0])


@contextmanager
def terminal(environment: Mapping[str, str], width: int = 80, height: int = 24) -> Iterator[Terminal]:
    """Run a terminal of `width` × `height` characters. environment: additional variables of its shell."""
    here = Terminal(f"terminal-{secrets.token_hex(6)}")
    command = ["tmux", "-L", here.server, "-f", "/dev/null", "new-session", "-d", "-x", str(width), "-y", str(height)]
    variables = {"PS1": "$ ", "TERM": "xterm-256color", **environment}
    shell = ["env", *(f"{name}={value}" for name, value in variables.items()), "bash", "--norc", "--noprofile"]
    subprocess.run([*command, *shell], check=True, env={**os.environ, **variables})
    try:
        yield here
    finally:
        subprocess.run(["tmux", "-L", here.server, "kill-server"], check=False, capture_output=True)
