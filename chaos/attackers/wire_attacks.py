"""Attacks on the HTTP server by raw connections that never send a complete, well-formed request."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import orjson

from chaos.attackers.attacker import CLOSED, HELD, Attack, Attacker, together
from chaos.attackers.attacks import COMPLETIONS, completion

HELD_S = 1.0
"""Seconds for which a round keeps idle connections open."""

PIECE = b"x" * (1 << 16)
HUGE_HEADER_BYTES = 60 << 20


async def _sent(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()


async def _huge_header(attacker: Attacker) -> None:
    async def do(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _sent(writer, attacker.head("GET", "/health") + b"x-a: ")
        for _ in range(HUGE_HEADER_BYTES // len(PIECE)):
            await _sent(writer, PIECE)
            if reader.at_eof():
                break
        await attacker.status_of(reader)

    await together(*(attacker.connect(do) for _ in range(10)))


async def _many_headers(attacker: Attacker) -> None:
    async def do(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _sent(writer, attacker.head("GET", "/health"))
        for first in range(0, 100_000, 1000):
            await _sent(writer, b"".join(b"x-%d: y\r\n" % number for number in range(first, first + 1000)))
        await _sent(writer, b"\r\n")
        await attacker.status_of(reader)

    await attacker.connect(do)


async def _long_path(attacker: Attacker) -> None:
    async def do(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _sent(writer, attacker.head("GET", "/v1/models/" + "a" * (2 << 20)) + b"\r\n")
        await attacker.status_of(reader)

    await attacker.connect(do)


async def _half_heads(attacker: Attacker) -> None:
    async def do(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _sent(writer, attacker.head("POST", COMPLETIONS) + b"x-half: " + b"y" * 8000)
        await attacker.hold(reader, HELD_S)

    await together(*(attacker.connect(do) for _ in range(200)))


async def _slow_bodies(attacker: Attacker) -> None:
    async def do(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = attacker.head("POST", COMPLETIONS, "content-type: application/json", "content-length: 4000000")
        await _sent(writer, head + b"\r\n" + b'{"prompt": "' + b"x" * 100_000)
        for _ in range(10):
            await attacker.hold(reader, HELD_S / 10)
            await _sent(writer, b"x")

    await together(*(attacker.connect(do) for _ in range(100)))


async def _slow_readers(attacker: Attacker) -> None:
    body = orjson.dumps(completion(max_tokens=400, ignore_eos=True, stream=True, logprobs=20, n=4))

    async def do(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if connected := writer.get_extra_info("socket"):
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        length = f"content-length: {len(body)}"
        head = attacker.head("POST", COMPLETIONS, "content-type: application/json", length)
        await _sent(writer, head + b"\r\n" + body)
        await asyncio.sleep(HELD_S)
        with contextlib.suppress(RuntimeError):
            writer.transport.resume_reading()  # type: ignore[attr-defined]
        await attacker.status_of(reader)

    await together(*(attacker.connect(do) for _ in range(16)))


async def _connections(attacker: Attacker) -> None:
    async def do(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await attacker.hold(reader, HELD_S)

    await together(*(attacker.connect(do) for _ in range(500)))


async def _pipelining(attacker: Attacker) -> None:
    async def do(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        one = attacker.head("GET", "/v1/models") + b"\r\n"
        for _ in range(20):
            await _sent(writer, one * 100)
        await attacker.status_of(reader)

    await attacker.connect(do)


async def _small_chunks(attacker: Attacker) -> None:
    async def do(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = ("content-type: application/json", "transfer-encoding: chunked")
        await _sent(writer, attacker.head("POST", COMPLETIONS, *lines) + b"\r\n")
        for _ in range(100):
            await _sent(writer, b"1\r\nx\r\n" * 1000)
        await _sent(writer, b"0\r\n\r\n")
        await attacker.status_of(reader)

    await attacker.connect(do)


async def _broken_heads(attacker: Attacker) -> None:
    heads = [
        attacker.head("POST", COMPLETIONS, "content-length: 5", "transfer-encoding: chunked"),
        attacker.head("POST", COMPLETIONS, "content-length: 5", "content-length: 6"),
        attacker.head("POST", COMPLETIONS, "content-length: -1"),
        attacker.head("POST", COMPLETIONS, "content-length: 99999999999999999999999"),
        attacker.head("POST", COMPLETIONS, "transfer-encoding: chunked") + b"\r\nffffffffffffffffff\r\nx",
        attacker.head("GET", "/health", "host: a", "host: b"),
        attacker.head("GET", "/health", "x\0y: z"),
        attacker.head("G\x01T", "/health"),
        attacker.head("GET", "/health", " folded: x"),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"PRI * HTTP/2.0\r\n\r\nSM",
        b"GET / HTTP/9.9\r\n",
        bytes(range(256)) * 100,
    ]

    async def one(head: bytes) -> None:
        async def do(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await _sent(writer, head + b"\r\n")
            writer.write_eof()
            await attacker.status_of(reader)

        await attacker.connect(do)

    await together(*(one(head) for head in heads))


WIRE_ATTACKS = (
    Attack("10 × one header of 60 MB", _huge_header, frozenset({CLOSED}), keyless=True),
    Attack("100,000 headers", _many_headers, frozenset({CLOSED}), keyless=True),
    Attack("a path of 2 MB", _long_path, frozenset({CLOSED}), keyless=True),
    Attack("200 half-sent heads", _half_heads, frozenset({HELD, CLOSED}), keyless=True),
    Attack("100 slow bodies", _slow_bodies, frozenset({HELD, CLOSED})),
    Attack("16 streams that no client reads", _slow_readers, frozenset({"200", CLOSED})),
    Attack("500 idle connections", _connections, frozenset({HELD, CLOSED}), keyless=True),
    Attack("2,000 pipelined requests", _pipelining, frozenset({"200", CLOSED}), keyless=True),
    Attack("100,000 chunks of a byte", _small_chunks, frozenset({CLOSED})),
    Attack("heads that are no HTTP", _broken_heads, frozenset({"200", "405", "505", CLOSED}), keyless=True),
)
