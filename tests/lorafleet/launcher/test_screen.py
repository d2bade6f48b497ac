"""What `lorafleet up` shows while services start."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lorafleet.launcher.screen import Screen


@pytest.mark.parametrize("is_terminal", [False, True])
def test_without_a_terminal_what_a_service_does_is_a_line_when_it_changes(is_terminal: bool) -> None:
    out = io.StringIO()
    screen = Screen(Console(file=out, force_terminal=is_terminal, highlight=False, soft_wrap=True, width=200))
    try:
        for activity in ("", "", "compiling [native] kernels", "compiling [native] kernels", "loading weights"):
            screen.starting("worker-0", activity)
        screen.ready("worker-0")
    finally:
        screen.close()
    lines = [line for line in out.getvalue().splitlines() if "worker-0" in line]
    if is_terminal:
        assert "ready in" in out.getvalue()
        return
    shown = [line.split(maxsplit=1)[1].rsplit(" (")[0] for line in lines[:-1]]
    assert shown == ["compiling [native] kernels", "loading weights"]
    assert "ready in" in lines[-1]
