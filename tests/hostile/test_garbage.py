"""Entries on the queue that are not messages: the services set them aside and answer as before."""

from __future__ import annotations

import http.client
from collections.abc import Iterator

import msgspec
import pytest
from hostile.fuzz.queue import PLACES, look, put
from hostile.fuzz.services import Services, services

from protocol.wire import messages as m

GARBAGE = {
    "nothing": {b"b": b""},
    "no message": {b"x": b"y"},
    "no msgpack": {b"b": b"\xc1"},
    "another kind": {b"b": msgspec.msgpack.encode([3])},
    "no UTF-8": {b"b": b"\x82\xa3rid\xa1\xff\xa4name\xa1\xff"},
    "a deep nest": {b"b": b"\x81\xa6config" + b"\x81\xa1a" * 20_000 + b"\xc0"},
    "no epoch": {b"b": m.encode(m.RequestHead(
        rid="garbage", tenant="t", cls="interactive", digest="", num_prompt_tokens=1, max_new_tokens=1, deadline_ms=1,
        gateway="g",
    )), b"e": b"x"},
}  # fmt: skip


@pytest.fixture(scope="module")
def running() -> Iterator[Services]:
    with services() as running:
        yield running


@pytest.mark.parametrize("place", PLACES)
def test_garbage_ends_no_service_and_no_honest_request(running: Services, place: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
    for fields in GARBAGE.values():
        running.do(put(running, place, {b"e": b"0", **fields}))
    for _ in range(3):
        look(running, connection)
    connection.close()
