"""A call whose submission got no reply from the queue is refused, so it must not run even if the queue has taken it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.script_queue import Queue, make_body, make_submit
from helpers.scripted_fleet import ScriptedFleet, gateway_client
from helpers.waiting import wait_until
from redis.exceptions import ConnectionError as RedisConnectionError

from gateway.calls.replies import MAX_ABANDONED, NUM_LOOKS, Replies
from protocol.queue.bus import Bus
from protocol.wire.clock import now_ms

DAY_MS = 86_400_000


class Cable:
    """Proxied connections to the queue, which are cut by the next submission once armed, until mended."""

    def __init__(self, path: str) -> None:
        """path: path of the socket on which the queue listens."""
        self._path = path
        self._writers: set[asyncio.StreamWriter] = set()
        self.is_cut = self.is_armed = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_cut:
            writer.close()
            return
        there, to_there = await asyncio.open_unix_connection(self._path)
        self._writers |= {writer, to_there}
        try:
            await asyncio.gather(self._carry(reader, to_there), self._carry(there, writer))
        finally:  # also if the test ends first
            to_there.close()
            writer.close()

    async def _carry(self, source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        while data := await source.read(1 << 16):
            to.write(data)
            if self.is_armed and b":sub:" in data and b"EVALSHA" in data:
                await to.drain()
                self.is_armed, self.is_cut = False, True
                for writer in self._writers:
                    writer.close()
        to.close()


@asynccontextmanager
async def cabled(bus: Bus) -> AsyncIterator[tuple[Cable, str]]:
    """Start a proxy in front of a queue; yield it with the queue's URL through it."""
    cable = Cable(bus.url.removeprefix("unix://"))
    async with await asyncio.start_server(cable.serve, "127.0.0.1", 0) as server:
        yield cable, f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"


FOLLOWED = {"model": "base", "prompt": "one", "max_tokens": 4}
IN_BACKGROUND = {"model": "base", "input": "one", "max_output_tokens": 4, "background": True}


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", FOLLOWED), ("/v1/responses", IN_BACKGROUND)])
async def test_a_call_that_was_refused_without_a_reply_is_not_run(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path, path: str, body: dict[str, Any]
) -> None:
    async with cabled(bus) as (cable, url), gateway_client(bus, model_folder, redis_url=url) as http:

        async def ask() -> None:
            assert (await http.post(path, json=body)).status_code == 200
            await wait_until(has_ended, "the call is answered")

        async def has_ended() -> bool:
            return not await bus.unfinished()

        await ask()
        fleet.assigning.clear()
        cable.is_armed = True
        answer = await http.post(path, json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "queue_unavailable")
        assert list((await bus.unfinished()).values()) == ["queued"]
        cable.is_cut = False
        await wait_until(has_ended, "the call is cancelled")
        fleet.assigning.set()
        await ask()
    (row,) = await bus.usage.rows(now_ms() // DAY_MS, "public")
    assert row.requests == 2


class Away(Bus):
    """A queue that is unreachable while `is_away`."""

    is_away = True

    async def cancel(self, rid: str) -> str:
        if self.is_away:
            raise RedisConnectionError
        return await super().cancel(rid)


@pytest.fixture
def queue(bus: Bus) -> Queue:
    return Queue(bus)


async def test_requests_are_cancelled_once_the_queue_can_be_reached(bus: Bus, queue: Queue) -> None:
    away = Away(bus.url)
    replies = Replies(away, "g", bus)
    await replies.open()
    for rid in ("waits", "late"):
        await replies.cancel([rid])
    pairs = [(make_submit(rid), make_body()) for rid in ("waits", "late")]
    await bus.submit("interactive", pairs[:1], max_queued=9)
    await replies.keep()
    assert await bus.unfinished() == {}
    await bus.submit("interactive", pairs[1:], max_queued=9)  # the server executes the submission only now
    await replies.keep()
    assert await bus.unfinished() == {}
    await away.close()


async def test_a_submission_that_arrives_after_its_cancellation_is_cancelled(bus: Bus, queue: Queue) -> None:
    """Its client may hang up meanwhile; a large submission has a separate connection, and so may be overtaken."""
    replies = Replies(bus, "g", bus)
    await replies.open()
    await replies.cancel(["late"])
    await bus.submit("interactive", [(make_submit("late"), make_body())], max_queued=9)
    await replies.keep()
    assert await bus.unfinished() == {}
    await replies.keep()
    assert not replies._abandoned


async def test_requests_that_are_to_be_cancelled_are_bounded(bus: Bus) -> None:
    replies = Replies(bus, "g", bus)
    await replies.open()
    replies.abandon([f"r{number}" for number in range(MAX_ABANDONED - 1)])
    replies.abandon(["a", "b"])
    assert len(replies._abandoned) == MAX_ABANDONED
    for _ in range(NUM_LOOKS + 1):
        await replies.keep()
    assert not replies._abandoned
