"""The Lua scripts, loaded once. What each does, and its arguments, is at the head of its file in `lua/`."""

from __future__ import annotations

from pathlib import Path

from redis.asyncio import Redis
from redis.commands.core import AsyncScript

NAMES = ("submit", "assign", "step", "finish", "cancel", "requeue", "retry", "lead", "repair", "position")
FOLDER = Path(__file__).parent / "lua"


class Scripts:
    """The scripts of one client; called by name, re-sent by redis-py when the server has forgotten them."""

    submit: AsyncScript
    assign: AsyncScript
    step: AsyncScript
    finish: AsyncScript
    cancel: AsyncScript
    requeue: AsyncScript
    retry: AsyncScript
    lead: AsyncScript
    repair: AsyncScript
    position: AsyncScript

    def __init__(self, client: Redis, folder: Path = FOLDER) -> None:
        common = (folder / "common.lua").read_text()
        for name in NAMES:
            source = common + (folder / f"{name}.lua").read_text()
            setattr(self, name, client.register_script(source))
