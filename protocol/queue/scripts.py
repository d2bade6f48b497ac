"""The Lua scripts, loaded once. What each does, and its keys, arguments and reply, is at the head of its file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from protocol.queue.redis_client import Client

NAMES = ("submit", "assign", "step", "finish", "cancel", "requeue", "retry", "lead", "repair", "position", "join")
FOLDER = Path(__file__).parent / "lua"


class Script(Protocol):
    """A registered script; redis-py sends it again when the server has forgotten it."""

    async def __call__(self, *, keys: Sequence[Any], args: Sequence[Any]) -> Any:
        """Run it. Replies are bytes, ints, and lists of them."""
        ...


class Scripts:
    """The scripts of one client, by the names of their files."""

    submit: Script
    assign: Script
    step: Script
    finish: Script
    cancel: Script
    requeue: Script
    retry: Script
    lead: Script
    repair: Script
    position: Script
    join: Script

    def __init__(self, client: Client, folder: Path = FOLDER) -> None:
        """Read the scripts in `folder`; each has `common.lua` before it."""
        common = (folder / "common.lua").read_text()
        for name in NAMES:
            setattr(self, name, client.register_script(common + (folder / f"{name}.lua").read_text()))
