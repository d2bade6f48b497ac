"""The line that scripts share: replies reach their callers, and failures of the line are recovered."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from select import select
from typing import Any

import pytest
from helpers.script_queue import Queue
from redis.exceptions import ResponseError

from protocol.queue.bus import Bus
from protocol.queue.connection.line import LOST, MAX_COMMAND_BYTES, MAX_WAITING, Line, NotTakenError
from protocol.queue.connection.redis_client import connect


async def test_replies_and_errors_reach_who_asked(bus: Bus) -> None:
    """A server error belongs to one command only."""

    async def ask(i: int) -> str:
        try:
            return (await bus._line.ask(("ECHO", str(i)) if i % 3 else ("NONE", i))).decode()
        except ResponseError:
            return "error"

    assert await asyncio.gather(*map(ask, range(MAX_WAITING))) == [
        str(i) if i % 3 else "error" for i in range(MAX_WAITING)
    ]


async def test_a_reply_nobody_waits_for_is_not_taken_for_anothers(bus: Bus) -> None:
    """A caller may be cancelled before its reply arrives."""
    await bus._line.ask(("PING",))  # opens the line
    tasks = [asyncio.create_task(bus._line.ask(("ECHO", i))) for i in range(100)]
    await asyncio.sleep(0)  # all are sent
    for task in tasks[::2]:
        task.cancel()
    replies = await asyncio.gather(*tasks, return_exceptions=True)
    assert replies[1::2] == [b"%d" % i for i in range(1, 100, 2)]
    assert all(isinstance(reply, asyncio.CancelledError) for reply in replies[::2])
    assert await bus._line.ask(("ECHO", "next")) == b"next"


class Recorded:
    """A transport that records how many commands each write has."""

    def __init__(self, transport: asyncio.WriteTransport) -> None:
        self._transport = transport
        self.writes: list[int] = []

    def writelines(self, commands: list[bytes]) -> None:
        self.writes.append(len(commands))
        self._transport.writelines(commands)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


async def test_commands_of_one_turn_of_the_loop_are_one_write(bus: Bus) -> None:
    """One write per command would wake the server for each, which costs more than the commands themselves."""
    await bus._line.ask(("PING",))  # opens the line
    talk = bus._line._talk
    assert talk is not None
    recorded = Recorded(talk._transport)
    talk._transport = recorded  # type: ignore[assignment]
    assert await asyncio.gather(*(bus._line.ask(("ECHO", i)) for i in range(40))) == [b"%d" % i for i in range(40)]
    assert recorded.writes == [40]
    waiting = [asyncio.create_task(bus._line.ask(("ECHO", i))) for i in range(3)]
    await asyncio.sleep(0)  # all are queued
    talk.end(LOST[0]("the line ends before they are sent"))
    assert all(isinstance(reply, LOST) for reply in await asyncio.gather(*waiting, return_exceptions=True))
    assert recorded.writes == [40]


async def test_a_reply_that_came_while_this_process_stood_still_is_not_late(bus: Bus) -> None:
    """A busy machine may suspend this process; the server does not count as lost because of that."""
    await bus._line.ask(("PING",))  # opens the line
    assert bus._line._talk is not None
    connection = bus._line._talk._transport.get_extra_info("socket")
    asked = asyncio.create_task(bus._line.ask(("ECHO", "there"), within_s=0.05))
    await asyncio.sleep(0)  # the command is queued
    time.sleep(0.06)  # noqa: ASYNC251  # this process does nothing while the server answers
    assert select([connection], [], [], 60)[0], "the reply has come"
    assert await asked == b"there"
    with pytest.raises(TimeoutError):
        await bus._line.ask(("BLPOP", "none", 1), within_s=0.05)
    assert await bus._line.ask(("ECHO", "next")) == b"next"


async def test_a_process_that_stood_still_before_it_sent_has_its_whole_time(bus: Bus) -> None:
    """A turn of the loop may last long between queuing a command and sending it in the next turn."""
    line = Line(bus._blocking, timeout_s=0.5)
    number = await line.ask(("CLIENT", "ID"))
    asked = asyncio.create_task(line.ask(("CLIENT", "ID")))
    await asyncio.sleep(0)  # the command is queued
    time.sleep(0.6)  # noqa: ASYNC251  # nothing is sent here
    assert await asked == number
    await line.close()


async def test_a_lost_line_is_told_to_all_who_wait_and_opened_again(bus: Bus) -> None:
    """A blocking command keeps the others waiting until the connection is lost."""
    number = await bus._line.ask(("CLIENT", "ID"))
    waiting = [asyncio.create_task(bus._line.ask(("BLPOP", "none", 0))) for _ in range(3)]
    await asyncio.sleep(0)
    assert await bus._redis.client_kill_filter(_id=number) == 1
    assert all(isinstance(reply, LOST) for reply in await asyncio.gather(*waiting, return_exceptions=True))
    assert await bus._line.ask(("ECHO", "again")) == b"again"


async def test_scripts_run_though_the_line_is_lost_or_the_server_forgot_them(queue: Queue) -> None:
    """redis-py reconnects, and loads the scripts again."""
    line = queue.bus._line
    assert await queue.submit("a") == ("ok", None)
    await queue.bus._redis.script_flush()
    assert await queue.submit("b") == ("ok", None)
    await queue.bus._redis.client_kill_filter(_id=await line.ask(("CLIENT", "ID")))
    assert await queue.submit("c") == ("ok", None)
    assert [rid for rid, _ in await queue.queued()] == ["a", "b", "c"]


async def test_a_large_command_takes_a_connection_of_its_own(queue: Queue) -> None:
    """On the line it would delay the commands behind it."""
    with pytest.raises(NotTakenError):
        await queue.bus._line.ask(("ECHO", bytes(MAX_COMMAND_BYTES)))
    assert await queue.bus._line.ask(("ECHO", "small")) == b"small"


async def test_no_more_wait_on_the_line_than_it_may_hold(bus: Bus) -> None:
    """The rest use connections of their own."""
    await bus._line.ask(("PING",))  # opens the line
    waiting = [asyncio.create_task(bus._line.ask(("ECHO", i))) for i in range(2 * MAX_WAITING)]
    replies = await asyncio.gather(*waiting, return_exceptions=True)
    assert replies[:MAX_WAITING] == [b"%d" % i for i in range(MAX_WAITING)]
    assert all(isinstance(reply, NotTakenError) for reply in replies[MAX_WAITING:])


async def test_a_server_that_does_not_answer_is_given_up(bus: Bus, tmp_path: Path) -> None:
    """Neither connecting nor a command takes longer than the timeout."""

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(4096):
            pass
        writer.close()

    async with await asyncio.start_unix_server(silent, tmp_path / "s"):
        client = connect(f"unix://{tmp_path / 's'}", timeout_s=None)
        line = Line(client, timeout_s=0.05)
        with pytest.raises(LOST):
            await line.ask(("ECHO", "1"))
        await line.close()
        await client.aclose()
    slow = Line(bus._blocking, timeout_s=0.05)
    with pytest.raises(LOST):
        await slow.ask(("BLPOP", "none", 0))
    await slow.close()


async def test_what_a_server_tells_unasked_is_no_reply(bus: Bus) -> None:
    """A server may push notifications between two replies."""
    line = bus._line
    await line.ask(("CLIENT", "TRACKING", "ON"))
    await line.ask(("GET", "watched"))
    await bus._redis.set("watched", "1", ex=60)
    assert await asyncio.gather(*(line.ask(("ECHO", i)) for i in range(3))) == [b"0", b"1", b"2"]
    await line.ask(("CLIENT", "TRACKING", "OFF"))


@pytest.mark.parametrize("answer", [b"what is this\r\n", b"-LOADING the data\r\n", b"-READONLY a replica\r\n", b""])
async def test_a_server_that_cannot_serve_loses_the_line(bus: Bus, tmp_path: Path, answer: bytes) -> None:
    """It speaks no valid protocol, reports that it cannot serve, or disconnects: all waiting callers get an error."""

    async def carry(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(4096):
            target.write(data)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward the real server's replies until an ECHO command arrives."""
        source, target = await asyncio.open_unix_connection(bus.url.removeprefix("unix://").partition("?")[0])
        carrying = asyncio.create_task(carry(source, writer))
        try:
            while b"ECHO" not in (data := await reader.read(4096)) and data:
                target.write(data)
            if data:
                writer.write(answer)
                await (reader.read() if answer else asyncio.sleep(0))
        finally:  # also if the test ends first
            carrying.cancel()
            target.close()
            writer.close()

    async with await asyncio.start_unix_server(serve, tmp_path / "s"):
        client = connect(f"unix://{tmp_path / 's'}", timeout_s=None)
        line = Line(client, timeout_s=30)
        await line.ask(("PING",))
        asked = await asyncio.gather(*(line.ask(("ECHO", i)) for i in range(3)), return_exceptions=True)
        assert all(isinstance(reply, LOST) for reply in asked)
        assert await line.ask(("PING",)) == b"PONG"  # on another connection
        await line.close()
        await client.aclose()


async def test_a_connection_whose_opening_is_cancelled_is_closed(tmp_path: Path) -> None:
    """It is in no pool: nobody else would close it."""
    opened, lost = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.set()
        await reader.read(-1)  # and answers nothing
        lost.set()
        writer.close()

    server = await asyncio.start_unix_server(serve, tmp_path / "sock")
    client = connect(f"unix://{tmp_path / 'sock'}", timeout_s=None)
    made, make = list[Any](), client.connection_pool.make_connection
    client.connection_pool.make_connection = lambda: made.append(make()) or made[-1]  # keeps it from being collected
    asked = asyncio.create_task(Line(client, 60.0).ask(("PING",)))
    await opened.wait()
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    try:
        async with asyncio.timeout(20):
            await lost.wait()
    finally:
        await made[0].disconnect()
        server.close()
        await client.aclose()


async def test_a_line_that_is_closed_while_it_opens_stays_closed(bus: Bus) -> None:
    line = Line(bus._redis, 60.0)
    asked = asyncio.create_task(line.ask(("PING",)))
    await asyncio.sleep(0)
    await line.close()
    with pytest.raises(LOST):
        await asked
    assert line._talk is None
    with pytest.raises(LOST):
        await line.ask(("PING",))
