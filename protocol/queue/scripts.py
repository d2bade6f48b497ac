"""The Lua scripts, loaded once. The head of each file describes its effect, keys, arguments and reply.

The first line of a file says whether its script may run while the server's memory is full (`allow-oom`). Scripts that
accept new work may not. Scripts that advance or end accepted work may, so that a full queue empties.
"""

from __future__ import annotations

import asyncio
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
    """The scripts of one client. Each can safely be run twice.

    So after a failure of the line, redis-py reconnects and runs the script again; it also loads the script if the
    server no longer has it.
    """

    def __init__(self, client: Client, line: Line, tag: str, folder: Path = FOLDER) -> None:
        """Register the scripts in `folder`. tag: `Keys.tag`."""
        self._client = client
        self._line = line
        self._tag = tag
        self._registered: dict[type[Call], tuple[Any, int]] = {}  # with the number of keys
        for kind, text in _texts(folder).items():
            self._registered[kind] = client.register_script(text), 1 + shape_of(kind)[0]

    async def run(self, call: Call) -> Any:
        """Run a script. The reply consists of bytes, ints and lists of them."""
        script, num_keys = self._registered[type(call)]
        words = call.laid_out()
        try:
            return await self._line.ask(("EVALSHA", script.sha, num_keys, self._tag, *words))
        except RedisTimeoutError:
            # Idle connections to the same silent server would each take as long to time out.
            await self._client.connection_pool.disconnect(inuse_connections=False)
        except NotTakenError:  # such a command takes half a millisecond to pack and send: other tasks run first
            await asyncio.sleep(0)
        except (*LOST, NoScriptError):
            pass
        num_own = num_keys - 1  # without the tag
        return await script(keys=[self._tag, *words[:num_own]], args=words[num_own:])

    async def write_vital(self, *commands: Sequence[Word]) -> list[Any]:
        """Run essential writes atomically, also while the server's memory is full; return replies. See `vital.lua`."""
        return await self.run(Vital(words=[word for command in commands for word in (len(command), *command)]))
