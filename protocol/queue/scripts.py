"""The Lua scripts, loaded once. What each does, and its keys, arguments and reply, is at the head of its file.

The first line of a file says whether its script runs while the server's memory is full (`allow-oom`). Those that accept
new work do not; those that carry accepted work on, and end it, do: so a full queue empties.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from redis.exceptions import NoScriptError
from redis.exceptions import TimeoutError as RedisTimeoutError

from protocol.queue.connection.line import LOST, Line, NotTakenError
from protocol.queue.connection.redis_client import Client

NAMES = (
    "submit", "assign", "step", "finish", "cancel", "requeue", "retry", "lead", "repair", "position", "join", "vital",
    "forget", "inputs", "keep_file", "drop_file", "open_batch", "claim_batch", "save_batch",
    "add_deliveries", "take_deliveries", "drop_ends", "keep_hook", "take_over",
    "change_conversation", "drop_conversation", "note_residency",
)  # fmt: skip
FOLDER = Path(__file__).parent / "lua"


class Script:
    """A registered script, which may be run twice.

    So what goes wrong on the line is left to redis-py, which connects again, and sends the script again when the server
    has forgotten it.
    """

    def __init__(self, client: Client, line: Line, text: str) -> None:
        self._client = client
        self._registered = client.register_script(text)
        self._line = line

    async def __call__(self, *, keys: Sequence[Any], args: Sequence[Any]) -> Any:
        """Run it. Replies are bytes, ints, and lists of them."""
        try:
            return await self._line.ask(("EVALSHA", self._registered.sha, len(keys), *keys, *args))
        except RedisTimeoutError:
            # Connections that were opened to the same silent server would each take as long.
            await self._client.connection_pool.disconnect(inuse_connections=False)
        except (*LOST, NotTakenError, NoScriptError):
            pass
        return await self._registered(keys=keys, args=args)


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
    vital: Script
    forget: Script
    inputs: Script
    keep_file: Script
    drop_file: Script
    open_batch: Script
    claim_batch: Script
    save_batch: Script
    add_deliveries: Script
    take_deliveries: Script
    drop_ends: Script
    keep_hook: Script
    take_over: Script
    change_conversation: Script
    drop_conversation: Script
    note_residency: Script

    def __init__(self, client: Client, line: Line, folder: Path = FOLDER) -> None:
        """Read the scripts in `folder`; each has `common.lua` after its first line."""
        common = (folder / "common.lua").read_text()
        for name in NAMES:
            flags, rest = (folder / f"{name}.lua").read_text().split("\n", 1)
            setattr(self, name, Script(client, line, f"{flags}\n{common}{rest}"))

    async def write_vital(self, tag: str, *commands: Sequence[str | bytes | int]) -> list[Any]:
        """Run writes that the fleet lives by, all at once, and return their replies. See `vital.lua`.

        tag: `Keys.tag`.
        """
        return await self.vital(keys=[tag], args=[word for command in commands for word in (len(command), *command)])
