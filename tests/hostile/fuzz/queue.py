"""Garbage on the queue: the readers of any stream entry or heartbeat set it aside and continue."""

from __future__ import annotations

import http.client
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import orjson
from helpers.script_queue import make_body, make_submit
from hostile.fuzz import messages, odd
from hostile.fuzz.engine import Check, Target
from hostile.fuzz.services import Services, services
from hypothesis import strategies as st

PLACES = (
    "interactive", "batch", "ended", "work", "orders", "deliveries", "events", "worker's beat", "store's beat",
    "body", "registration", "alias",
)  # fmt: skip
"""Where garbage is written."""

KINDS = {
    "interactive": "RequestHead", "batch": "RequestHead", "ended": "Ended", "work": "Assigned", "orders": "Control",
    "deliveries": "Delta", "events": "AdapterEvent", "worker's beat": "WorkerBeat", "body": "Body",
    "registration": "Registration", "alias": "Alias",
}  # fmt: skip
"""Place -> the kind of message expected there."""

ROUND = 25
"""Number of cases between two checks that the fleet still answers."""


@st.composite
def entries(draw: st.DrawFn) -> tuple[str, dict[bytes, bytes]]:
    """Draw a place and the fields of an entry for it; `b` is the message, damaged or of another kind."""
    place = draw(st.sampled_from(PLACES))
    how = draw(st.sampled_from(["bytes", "damaged", "another", "value"]))
    if how == "bytes":
        raw = draw(st.binary(max_size=40))
    elif how == "value":
        raw = msgspec.msgpack.encode(draw(messages.msgpack_values))
    else:
        name = KINDS.get(place, "Alias") if how == "damaged" else draw(st.sampled_from(sorted(messages.KINDS)))
        value = draw(messages.GOOD[name])
        raw = msgspec.msgpack.encode([value] if name in messages.LISTS else value)
        raw = draw(odd.damaged(st.just(raw))) if how == "damaged" else raw
    fields = {b"b": raw, b"e": draw(st.sampled_from([b"0", b"0", b"x", b"", b"-1", b"9" * 30, b"\xff"]))}
    for name in (b"b", b"e"):
        if draw(st.integers(0, 12)) == 0:
            del fields[name]
    return place, fields or {b"x": b"y"}


def is_readable(place: str, fields: dict[bytes, bytes]) -> bool:
    """Return whether an entry is a valid message: writing it needs access to the queue, so it is not garbage."""
    name = KINDS.get(place)
    return name is not None and messages.can_be_read(name, fields.get(b"b", b""))


@contextmanager
def _fleet() -> Iterator[Check]:
    with services(max_attempts=50) as running:
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
        num = 0

        def check(case: tuple[str, dict[bytes, bytes]]) -> str:
            nonlocal num
            place, fields = case
            if is_readable(place, fields):
                return "a message, left out"
            running.do(put(running, place, fields))
            num += 1
            if num % ROUND == 0:
                look(running, connection)
            return f"put among {place}"

        try:
            yield check
            look(running, connection)
        finally:
            connection.close()


async def put(running: Services, place: str, fields: dict[bytes, bytes]) -> None:
    """Write garbage to a place on the queue."""
    keys, redis, raw = running.bus.keys, running.bus._redis, fields.get(b"b", b"")
    streams = {
        "interactive": keys.sub("interactive"), "batch": keys.sub("batch"), "ended": keys.ended,
        "work": keys.work(running.wid), "orders": keys.ctl(running.wid), "deliveries": keys.out(running.gid),
        "events": keys.adapter_events,
    }  # fmt: skip
    if place in streams:
        await redis.xadd(streams[place], fields)
    elif place == "worker's beat":
        await redis.zadd(keys.workers, {"garbage": 1e15})
        await redis.set(keys.worker_beat("garbage"), raw, px=500)
    elif place == "store's beat":
        await redis.zadd(keys.stores, {"garbage": 1e15})
        await redis.set(keys.store_beat("garbage"), raw, px=200)
    elif place == "body":
        rid = f"garbage-{secrets.token_hex(8)}"
        await running.bus.submit("interactive", [(make_submit(rid), make_body())], max_queued=1000)
        common = {"common": raw} if b"e" in fields else {}  # without `e`, the call has only one body
        await redis.hset(keys.body(rid), mapping={"0": raw, **common})
    elif place == "registration":
        await redis.hset(keys.registrations, "garbage", raw)
        await redis.xadd(keys.adapter_events, {"b": msgspec.msgpack.encode({"kind": "wanted", "name": "garbage"})})
    else:
        await redis.hset(keys.adapters, "garbage", raw)
        await redis.xadd(keys.adapter_events, {"b": msgspec.msgpack.encode({"kind": "alias", "name": "garbage"})})


def look(running: Services, connection: http.client.HTTPConnection) -> None:
    """Raise AssertionError unless every service runs and requests are answered as usual."""
    assert not (ended := running.ended()), ended
    body: dict[str, Any] = {"model": "base", "prompt": "hi", "max_tokens": 3, "ignore_eos": True}
    for path, sent in (("/v1/completions", orjson.dumps(body)), ("/v1/models", None), ("/v1/adapters", None)):
        connection.request("POST" if sent else "GET", path, sent, {"content-type": "application/json"})
        answer = connection.getresponse()
        raw = answer.read()
        assert answer.status == 200, (path, answer.status, raw)
    assert not (ended := running.ended()), ended


TARGETS = (Target("garbage on the queue", entries(), _fleet, cost=8.0),)
