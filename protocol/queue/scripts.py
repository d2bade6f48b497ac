"""The Lua scripts, loaded once. What each does, and its keys, arguments and reply, is at the head of its file.

The first line of a file says whether its script runs while the server's memory is full (`allow-oom`). Those that accept
new work do not; those that carry accepted work on, and end it, do: so a full queue empties.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from redis.exceptions import NoScriptError
from redis.exceptions import TimeoutError as RedisTimeoutError

from protocol.queue.connection.line import LOST, Line, NotTakenError
from protocol.queue.connection.redis_client import Client
from protocol.queue.script_call import Call, Word, shape_of
from protocol.queue.signatures import SIGNATURES, Vital

FOLDER = Path(__file__).parent / "lua"


@cache
def _texts(folder: Path) -> dict[type[Call], str]:
    """Return the text of each script in a folder, with `common.lua` after its first line."""
    common = (folder / "common.lua").read_text()
    texts: dict[type[Call], str] = {}
    for kind in SIGNATURES:
        flags, rest = (folder / f"{kind.script()}.lua").read_text().split("\n", 1)
        texts[kind] = f"{flags}\n{common}{rest}"
    return texts


class Scripts:
    """The scripts of one client. Each may be run twice.

    So what goes wrong on the line is left to redis-py, which connects again, and sends the script again when the server
    has forgotten it.
    """

    def __init__(self, client: Client, line: Line, tag: str, folder: Path = FOLDER) -> None:
        """Read the scripts in `folder`; each has `common.lua` after its first line. tag: `Keys.tag`."""
        self._client = client
        self._line = line
        self._tag = tag
        self._registered: dict[type[Call], tuple[Any, int]] = {}  # with the number of its keys
        for kind, text in _texts(folder).items():
            self._registered[kind] = client.register_script(text), 1 + shape_of(kind)[0]

    async def run(self, call: Call) -> Any:
        """Run a script. Replies are bytes, ints, and lists of them."""
        script, num_keys = self._registered[type(call)]
        words = call.laid_out()
        try:
            return await self._line.ask(("EVALSHA", script.sha, num_keys, self._tag, *words))
        except RedisTimeoutError:
            # Connections that were opened to the same silent server would each take as long.
            await self._client.connection_pool.disconnect(inuse_connections=False)
        except (*LOST, NotTakenError, NoScriptError):
            pass
        num_own = num_keys - 1  # without the tag
        return await script(keys=[self._tag, *words[:num_own]], args=words[num_own:])

    async def write_vital(self, *commands: Sequence[Word]) -> list[Any]:
        """Run writes that the fleet lives by, all at once, and return their replies. See `vital.lua`."""
        return await self.run(Vital(words=[word for command in commands for word in (len(command), *command)]))
