"""A JSON text that is read in pieces has the value, and the errors, of one that is read at once."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.bodies import json_values
from protocol.wire.errors import BadRequest

STRINGS = st.text(max_size=4) | st.sampled_from(["\\", '"', '\\"', "[,{:", "]}", "é😀", ""])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 999) | STRINGS,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(STRINGS, inner, max_size=6),
    max_leaves=60,
)
BYTES = st.sampled_from([bytes([byte]) for byte in b'[]{},:"\\ 1a\n'] + [b"", b"\xff"])


tiny = partial(json_values.Marks, piece_bytes=12, piece_marks=4)


def read(raw: bytes, at_once: bool) -> Any:
    """Return a text's value in a list, None if it is no JSON."""
    try:
        return [orjson.loads(raw) if at_once else tiny(raw).value()]
    except ValueError:
        return None


@given(value=VALUES, spaced=st.booleans())
def test_pieces_have_the_value_of_the_whole(value: Any, spaced: bool) -> None:
    raw = orjson.dumps(value, option=orjson.OPT_INDENT_2 if spaced else None)
    assert tiny(raw).value() == value


@given(value=VALUES, at=st.integers(0, 400), num=st.integers(0, 2), put=BYTES)
def test_pieces_are_json_only_where_the_whole_is(value: Any, at: int, num: int, put: bytes) -> None:
    whole = orjson.dumps(value)
    at %= len(whole) + 1
    raw = whole[:at] + put + whole[at + num :]
    try:
        found = read(raw, at_once=False)
    except BadRequest:  # with strings inverted, brackets that are in none may be too many
        found = None
    assert found == read(raw, at_once=True)


@pytest.mark.parametrize(
    "raw",
    [b"[1,2,3,4,,5]", b"[1,2,3,4,]", b"[,1,2,3,4]", b'{"a":1,"b":2,"c":3,}', b"[[1,2,3,4,5] 6]", b"[7 [1,2,3,4,5]]",
     b"[[1,2,3,4,5}]", b"[1,2,3,4,5][6]", b'{"a" "b":[1,2,3,4,5]}', b"{1:[1,2,3,4,5]}", b'{"a":[1,2,3,4,5]:2}',
     b"[1,2,3,4:5]", b"[1,2,3,4,5", b"[1,2,3,4,5]]", b'["a,b,c,d,e]', b"x[1,2,3,4,5]"],
)  # fmt: skip
def test_what_is_between_pieces_is_read_too(raw: bytes) -> None:
    assert read(raw, at_once=False) is None


def test_errors_name_their_character() -> None:
    raw = '["ééé",1,2,3,4,5,6,nul]'.encode()
    with pytest.raises(orjson.JSONDecodeError) as whole:
        orjson.loads(raw)
    with pytest.raises(orjson.JSONDecodeError) as pieces:
        tiny(raw).value()
    assert pieces.value.pos == whole.value.pos


async def test_the_event_loop_has_its_turn_between_pieces() -> None:
    """No piece that is read at once has more than its bytes, whatever a body consists of."""
    read: list[int] = []

    class Noted(json_values.Marks):
        def _read(self, begin: int, left: bytes, end: int, right: bytes) -> Any:
            read.append(end - begin)
            return super()._read(begin, left, end, right)

    tools = [{"name": f"f{i}", "schema": {f"a{k}": {} for k in range(3000)}} for i in range(5)]
    for value in (tools, {"a": tools}, list(range(200_000)), ["text" * 10] * 60_000, [[[tools]]]):
        raw = orjson.dumps(value)
        assert await asyncio.to_thread(lambda raw=raw: Noted(raw).value()) == value
        assert sum(read) > len(raw) // 2
        assert max(read) <= json_values.PIECE_BYTES
        read.clear()
