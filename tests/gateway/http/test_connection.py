"""Limits of a connection: bytes of heads and framing, pipelined requests, time, and unread answers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from helpers import examples
from helpers.byte_clients import GET, LIMITS, POST, Running, with_server
from prometheus_client import REGISTRY

from gateway.http.addresses import origin_of
from gateway.overload.memory import SHARE, MemoryAccount, address_holder
from gateway.server import connection as http_connection
from gateway.server.connection import MAX_HEAD_BYTES, MAX_HEADERS, MAX_HELD_BYTES, MAX_PIPELINED, Parts


def parts_of(answer: bytes) -> tuple[int, dict[str, Any]]:
    """Return status and JSON of an answer, which must be the last on its connection."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/json" in head
    assert b"connection: close" in head
    return int(head.split()[1]), json.loads(body)


@pytest.mark.parametrize(
    "head",
    [
        GET + b"a: " + b"x" * (1 << 20),
        GET + b"x" * (1 << 20),
        GET + b"a: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n",
        b"GET /v1/" + b"x" * (1 << 20),
        GET + b"".join(b"a%d: 1\r\n" % i for i in range(MAX_HEADERS + 1)) + b"\r\n",
    ],
)
def test_a_large_head_is_431_before_it_is_complete(head: bytes) -> None:
    async def test(run: Running) -> None:
        status, body = parts_of(await run.send(head))
        assert (status, body["error"]["code"]) == (431, "headers_too_large")
        assert run.app.scopes == []

    with_server(test)


def test_a_head_up_to_the_limit_is_served() -> None:
    async def test(run: Running) -> None:
        head = GET + b"connection: close\r\na: " + b"x" * (MAX_HEAD_BYTES - 200) + b"\r\n\r\n"
        assert (await run.send(*[head[at : at + 1000] for at in range(0, len(head), 1000)])).startswith(b"HTTP/1.1 200")

    with_server(test)


def test_heads_that_never_end_hold_no_more_than_their_limit() -> None:
    async def test(run: Running) -> None:
        for _ in range(10):
            _, writer = await run.connect()
            writer.write(GET + b"a: " + b"x" * (MAX_HEAD_BYTES - 100))
        await run.until(lambda: [c._num_bytes > MAX_HEAD_BYTES // 2 for c in run.connections] == [True] * 10)
        assert all(connection._num_bytes <= MAX_HEAD_BYTES for connection in run.connections)
        run.sweep()
        await run.until(lambda: all(connection._phase == "linger" for connection in run.connections))
        run.sweep()
        await run.until(lambda: not run.connections)

    with_server(test)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"hello\r\n\r\n",
        b"GET /v1/models HTTP/9.9\r\n\r\n",
        GET + b"\x00: 1\r\n\r\n",
        POST + b"content-length: 2\r\ncontent-length: 3\r\n\r\nab",
        POST + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\nab",
        POST + b"content-length: -2\r\n\r\n",
        POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_http_is_400_as_json(request_bytes: bytes) -> None:
    async def test(run: Running) -> None:
        status, body = parts_of(await run.send(request_bytes))
        assert (status, body["error"]["type"]) == (400, "invalid_request_error")

    with_server(test)


def test_errors_have_the_shape_of_the_path() -> None:
    async def test(run: Running) -> None:
        for begin in (b"POST /v1/messages HTTP/1.1\r\n", b"GET /v1/models/a HTTP/1.1\r\nanthropic-version: 1\r\n"):
            status, body = parts_of(await run.send(begin + b"Host: x\r\na: " + b"x" * MAX_HEAD_BYTES))
            assert (status, body["type"], body["request_id"]) == (431, "error", None)
            assert body["error"]["details"] == {"error_code": "headers_too_large"}
        begin = b"POST /generate HTTP/1.1\r\nHost: x\r\n"
        status, body = parts_of(await run.send(begin + b"a: " + b"x" * MAX_HEAD_BYTES))
        assert (status, set(body), body["error_type"]) == (431, {"error", "error_type"}, "headers_too_large")
        status, body = parts_of(await run.send(begin + b"content-length: x\r\n\r\n"))
        assert (status, body["error_type"]) == (400, "bad_request")

    with_server(test)


def test_slow_heads_and_bodies_are_408() -> None:
    async def test(run: Running) -> None:
        for begin in (GET, POST + b"content-length: 1000\r\n\r\nabc"):
            reader, writer = await run.connect()
            writer.write(begin)
            await run.until(lambda: any(c._phase in ("head", "body") for c in run.connections))
            for connection in run.connections:
                connection.sweep(asyncio.get_running_loop().time())
            assert all(connection._phase in ("head", "body") for connection in run.connections)  # before the deadline
            run.sweep()
            status, body = parts_of(await reader.read())
            assert (status, body["error"]["code"]) == (408, "request_timeout")
            writer.close()
            await run.until(lambda: not run.connections)

    with_server(test)


def test_a_connection_without_a_request_is_closed() -> None:
    async def test(run: Running) -> None:
        reader, _ = await run.connect()
        await run.until(lambda: run.connections)
        run.sweep()
        assert await reader.read() == b""

    with_server(test)


def test_a_slow_body_that_waits_for_the_gateway_is_given_time() -> None:
    """A client can't send more while its bytes are not read."""

    async def test(run: Running) -> None:
        _, writer = await run.connect()
        writer.write(POST.replace(b"/v1/completions", b"/wait") + b"content-length: 400000\r\n\r\n" + b"x" * 400_000)
        await run.until(lambda: run.connections and run.connections[0]._phase == "answer")
        run.sweep()
        assert run.connections[0]._phase == "answer"

    with_server(test)


FRAMINGS = {
    "tiny chunks": b"1\r\nx\r\n" * 50_000,
    "a chunk's extension": b"1;" + b"x" * (1 << 20),
    "a trailer": b"1\r\nx\r\n0\r\na: " + b"x" * (1 << 20),
    "trailers": b"1\r\nx\r\n0\r\n" + b"".join(b"a%d: 1\r\n" % i for i in range(MAX_HEADERS + 1)),
}


@pytest.mark.parametrize("kind", examples.some(FRAMINGS, "tiny chunks", "trailers"))
def test_the_framing_of_a_body_is_bounded(kind: str) -> None:
    body = FRAMINGS[kind]

    async def test(run: Running) -> None:
        request = POST + b"transfer-encoding: chunked\r\n\r\n" + body
        answer = await run.send(*[request[at : at + 1000] for at in range(0, len(request), 1000)])
        assert answer == b"" or parts_of(answer)[0] in (400, 431)
        await run.until(lambda: not run.connections)
        assert all(len(scope["headers"]) < 5 for scope in run.app.scopes)

    with_server(test)


def test_trailers_do_not_become_headers() -> None:
    async def test(run: Running) -> None:
        head = POST + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n"
        answer = await run.send(head, b"3\r\nabc\r\n", b"0\r\nx-api-key: stolen\r\n\r\n")
        assert answer.endswith(b"\r\n\r\n3")
        assert b"x-api-key" not in dict(run.app.scopes[0]["headers"])

    with_server(test)


def test_cookies_are_left_out_before_anybody_parses_them() -> None:
    async def test(run: Running) -> None:
        await run.send(GET + b"Cookie: " + b"a=1;" * 10_000 + b"\r\nx-other: b\r\nconnection: close\r\n\r\n")
        names = {name for name, _ in run.app.scopes[0]["headers"]}
        assert b"x-other" in names
        assert b"cookie" not in names

    with_server(test)


def test_chunks_of_ordinary_size_are_served() -> None:
    async def test(run: Running) -> None:
        head = POST + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n"
        answer = await run.send(head, *[b"64\r\n" + b"x" * 100 + b"\r\n"] * 5000, b"0\r\n\r\n")
        assert answer.endswith(b"\r\n\r\n500000")

    with_server(test)


def test_requests_sent_ahead_are_bounded_and_answered_in_order() -> None:
    async def test(run: Running) -> None:
        reader, writer = await run.connect()
        some = [POST + b"content-length: %d\r\n\r\n" % i + b"x" * i for i in range(8)]
        writer.write(b"".join(some))
        for i in range(8):
            await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(1) == b"%d" % i
        assert await run.send((GET + b"\r\n") * (MAX_PIPELINED + 3)) == b""
        await run.until(lambda: len(run.app.scopes) >= 9)
        assert len(run.app.scopes) < 8 + MAX_PIPELINED

    with_server(test)


@pytest.mark.parametrize("rest", [b"", b"GARBAGE"])
def test_who_has_sent_ahead_and_goes_is_gone_for_what_runs(rest: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """The running request is notified too, not only the newest; otherwise, it would be computed in vain."""

    async def test(run: Running) -> None:
        _, writer = await run.connect()
        writer.write(GET.replace(b"/v1/models", b"/silent") + b"\r\n" + GET + b"\r\n")
        await run.until(lambda: run.connections and run.connections[0].pipeline)
        if rest:
            writer.write(rest)  # not HTTP, so the connection is dropped
        else:
            writer.close()
        await run.app.ended.wait()
        await run.until(lambda: not run.connections)
        assert len(run.app.scopes) == 1  # the pipelined request is not started

    with_server(test)
    assert "Traceback" not in caplog.text


def test_a_body_that_nobody_reads_is_not_held_and_not_endless() -> None:
    async def test(run: Running) -> None:
        head = POST.replace(b"/v1/completions", b"/refused") + b"content-length: 1000000000\r\n\r\n"
        _, writer = await run.connect()
        writer.write(head)
        held = 0
        for _ in range(100):
            writer.write(b"x" * 65536)
            try:
                await writer.drain()
            except ConnectionError:
                break
            held = max([held, *(len(connection.cycle.body) for connection in run.connections if connection.cycle)])
        assert held <= 64 * 1024 + 256 * 1024
        await run.until(lambda: not run.connections)

    with_server(test)


def test_who_does_not_read_a_stream_is_dropped_with_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    def dropped() -> float:
        return REGISTRY.get_sample_value("lorafleet_http_dropped_total", {"reason": "slow_reader"}) or 0.0

    async def test(run: Running) -> None:
        before = dropped()
        _, writer = await run.connect()
        writer.write(GET.replace(b"/v1/models", b"/stream") + b"\r\n")
        await run.until(lambda: run.connections and run.connections[0]._unsent_since_s is not None)
        assert run.connections[0].transport.get_write_buffer_size() < 1 << 17  # the rest is in the system's buffers
        run.connections[0].sweep(asyncio.get_running_loop().time())
        assert not run.app.ended.is_set()
        run.sweep()
        await run.app.ended.wait()
        assert dropped() == before + 1
        assert "slow_reader" in caplog.text
        writer.close()

    with_server(test)


def test_parts_are_written_until_their_client_has_to_be_waited_for() -> None:
    async def test(run: Running) -> None:
        reader, writer = await run.connect()
        writer.write(GET.replace(b"/v1/models", b"/parts") + b"\r\n")
        await run.until(lambda: run.connections and run.connections[0]._unsent_since_s is not None)
        assert not run.connections[0].takes_parts
        assert not run.app.ended.is_set()
        raw = b""
        while not raw.endswith(b"0\r\n\r\n"):
            raw += await reader.read(1 << 16)
        chunks = raw.partition(b"\r\n\r\n")[2].split(b"\r\n")[1:-3:2]
        assert b"".join(chunks) == b"x" * run.app.num_sent + b"the end"
        await run.app.ended.wait()
        writer.close()

    with_server(test)


async def test_parts_are_written_in_order_and_held_up_to_a_limit() -> None:
    class Transport(asyncio.Transport):
        gone = False

        def write(self, data: Any) -> None:
            written.append((self, data))

        def is_closing(self) -> bool:
            return self.gone

    written: list[tuple[asyncio.Transport, bytes]] = []
    one, other, parts = Transport(), Transport(), Parts()
    parts.add(one, b"a")
    parts.add(other, b"bb")
    parts.add(one, b"c")
    assert written == []
    await asyncio.sleep(0)
    assert written == [(one, b"1\r\na\r\n"), (other, b"2\r\nbb\r\n"), (one, b"1\r\nc\r\n")]
    written.clear()
    other.gone = True
    parts.add(other, b"d")
    parts.add(one, b"e" * MAX_HELD_BYTES)
    assert [transport for transport, _ in written] == [one]
    parts.add(one, b"f")
    await asyncio.sleep(0)
    assert written[1:] == [(one, b"1\r\nf\r\n")]


def test_parts_are_not_written_to_who_has_gone() -> None:
    async def test(run: Running) -> None:
        _, writer = await run.connect()
        writer.write(GET.replace(b"/v1/models", b"/parts") + b"\r\n")
        await run.until(lambda: run.app.num_sent)
        writer.transport.abort()
        await run.app.ended.wait()

    with_server(test)


def test_who_reads_a_stream_slowly_but_steadily_is_served() -> None:
    async def test(run: Running) -> None:
        reader, writer = await run.connect()
        writer.write(GET.replace(b"/v1/models", b"/stream") + b"\r\n")
        for _ in range(50):
            await reader.readexactly(1 << 16)
            for connection in run.connections:
                connection.sweep(asyncio.get_running_loop().time() + LIMITS.send_s - 1)
        assert run.connections
        writer.close()
        await run.app.ended.wait()

    with_server(test)


def test_what_nobody_reads_is_charged_to_its_address() -> None:
    memory = MemoryAccount(SHARE * 40_000)

    def dropped() -> float:
        return REGISTRY.get_sample_value("lorafleet_http_dropped_total", {"reason": "memory"}) or 0.0

    async def test(run: Running) -> None:
        before = dropped()
        _, first = await run.connect()
        first.write(GET + b"x: " + b"y" * 30_000)  # a head without an end
        await run.until(lambda: memory.held_by(address_holder("")) > 25_000)
        answer = await run.send(GET + b"x: " + b"y" * 30_000)
        assert answer.startswith(b"HTTP/1.1 429 ")
        assert b"address localhost holds" in answer
        assert b"the limit is 40000" in answer
        first.close()
        await run.until(lambda: not memory.num_bytes)
        _, second = await run.connect()
        second.write(POST + b"content-length: 900000\r\n\r\n" + b"z" * 50_000)  # read at once, and so not buffered
        await run.until(lambda: len(run.app.scopes) == 1)
        run.connections[0].sweep(asyncio.get_running_loop().time())
        assert memory.num_bytes == 0
        _, third = await run.connect()
        third.write(GET.replace(b"/v1/models", b"/stream") + b"\r\n")
        await run.until(lambda: memory.num_bytes or dropped() > before)  # whose client does not read
        third.close()
        second.close()
        await run.until(lambda: not memory.num_bytes and not run.connections)

    with_server(test, memory=memory)


def test_an_answer_that_has_no_room_is_cut_off() -> None:
    memory = MemoryAccount(SHARE * 5000)

    async def test(run: Running) -> None:
        reader, writer = await run.connect()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(GET.replace(b"/v1/models", b"/stream") + b"\r\n")
        await run.until(lambda: run.connections)
        await run.until(lambda: not run.connections)
        assert memory.num_bytes == 0
        await run.app.ended.wait()
        del reader

    with_server(test, memory=memory)


def test_connections_are_counted_by_address() -> None:
    assert [origin_of((host, 1)) for host in ("127.0.0.1", "10.0.0.1", "::ffff:10.0.0.1")] == [
        "", "10.0.0.1", "10.0.0.1",
    ]  # fmt: skip
    assert origin_of(("::1", 1, 0, 0)) == ""
    assert origin_of(("2001:db8::1", 1, 0, 0)) == origin_of(("2001:db8::ffff", 1, 0, 0))
    assert origin_of(("2001:db8::1", 1, 0, 0)) != origin_of(("2001:db8:0:1::1", 1, 0, 0))

    async def test(run: Running) -> None:
        first, second = await run.connect(), await run.connect()
        await run.until(lambda: len(run.connections) == 2)
        assert await run.send(GET + b"\r\n") == b""  # above the limit
        first[1].close()
        await run.until(lambda: len(run.connections) == 1)
        assert (await run.send(GET + b"connection: close\r\n\r\n")).startswith(b"HTTP/1.1 200")
        second[1].close()
        await run.until(lambda: not run.server._num_of)

    with_server(test, max_per_address=2, origin_of=lambda address: "10.0.0.1")


def test_the_limits_of_a_connection_are_those_that_the_docs_tell() -> None:
    assert (http_connection.MAX_HEAD_BYTES, http_connection.MAX_PIPELINED) == (65536, 16)
