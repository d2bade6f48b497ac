"""The Lua scripts, loaded once. What each does, and its arguments, is at the head of its file in `lua/`."""

from __future__ import annotations

import uuid
from pathlib import Path

from redis.asyncio import Redis
from redis.commands.core import AsyncScript

NAMES = (
    "submit", "assign", "step", "finish", "cancel", "requeue", "retry", "lead", "repair", "position", "merge", "join"
)  # fmt: skip
_FOLDER = Path(__file__).parent / "lua"


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
    merge: AsyncScript
    join: AsyncScript

    def __init__(self, client: Redis) -> None:
        common = (_FOLDER / "common.lua").read_text()
        for name in NAMES:
            source = common + (_FOLDER / f"{name}.lua").read_text()
            if name == "step":
                # Nobody else's script: a server that knows it is the process that this client has written steps
                # to, since scripts are neither saved nor replicated.
                source += f"\n-- {uuid.uuid4().hex}"
            setattr(self, name, client.register_script(source))
