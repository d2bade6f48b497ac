"""Reading JSON in pieces gives the same values and errors as reading it at once, at a bounded cost."""

from __future__ import annotations

import asyncio
import json
import time
import tracemalloc
from functools import partial
from typing import Any

import orjson
import pytest
from helpers import examples
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
MAX_BODY = 4 << 20

BYTES = st.sampled_from([bytes([byte]) for byte in b'[]{},:"\\ 1a\n'] + [b"", b"\xff"])


tiny = partial(json_values.Marks, piece_bytes=12, piece_marks=4)


def read(raw: bytes, at_once: bool) -> Any:
    """Return the value of a text in a list, or None if it is not JSON."""
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
    except BadRequest:  # with inverted strings, there may be too many brackets outside strings
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


@pytest.mark.parametrize("raw", [b"[%b]", b"{%b}", b"[1,[%b]]", b'{"a":{%b}}', b'{"a":[[%b],2]}'])
def test_what_is_empty_may_have_any_space_inside(raw: bytes) -> None:
    for num in (0, 1, 13, 40):
        spaced = raw % (b"\n \t\r" * num)
        assert tiny(spaced).value() == json.loads(spaced)
        assert read(spaced.replace(b"\t", b"\x0b"), at_once=False) == read(spaced.replace(b"\t", b"\x0b"), at_once=True)


@pytest.mark.parametrize(
    "raw",
    [b"%b,", b"%b 1", b"1 %b", b"%b%b", b"%b,%b", b'{"a":%b []}', b'{"a":[] %b}', b'{"a":%b1}', b"[%b 1]", b"[1 %b]",
     b"[%b:1]", b'{"a":%b:1}', b"[[1,2] %b]", b'{"a":"b" %b}', b"{%b:1}", b'{"a":%b%b}'],
)  # fmt: skip
@pytest.mark.parametrize("large", [b"[1,2,3,4,5,6,7,8]", b'{"a":1,"b":2,"c":3,"d":4}', b"[[1,2,3,4,5,6,7,8]]"])
def test_a_text_beside_a_large_value_makes_nothing_be_read_at_once(raw: bytes, large: bytes) -> None:
    class Bounded(json_values.Marks):
        def _read(self, begin: int, left: bytes, end: int, right: bytes) -> Any:
            assert end - begin <= 12, "it is longer than a piece"
            return super()._read(begin, left, end, right)

    text = raw.replace(b"%b", large)
    with pytest.raises(orjson.JSONDecodeError):
        Bounded(text, piece_bytes=12, piece_marks=4).value()


def test_errors_name_their_character() -> None:
    raw = '["ééé",1,2,3,4,5,6,nul]'.encode()
    with pytest.raises(orjson.JSONDecodeError) as whole:
        orjson.loads(raw)
    with pytest.raises(orjson.JSONDecodeError) as pieces:
        tiny(raw).value()
    assert pieces.value.pos == whole.value.pos


async def test_the_event_loop_has_its_turn_between_pieces() -> None:
    """No piece exceeds the limit on bytes, whatever a body contains."""
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


# ---------------------------------------------------------------- limits


def filled(unit: bytes, before: bytes = b"[", after: bytes = b"]") -> bytes:
    """Return the largest allowed body that repeats a value."""
    num = (MAX_BODY - len(before) - len(after)) // len(unit)
    return before + (unit * num)[:-1] + after


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (filled(b"[],"), "lists and objects"),
        (filled(b"{},"), "lists and objects"),
        (filled(b'{"a":1},'), "lists and objects"),
        (b"{" + filled(b'"a":1,', b"", b"") + b"}", "strings"),
        (b"{" + b",".join(b'"%d":1' % i for i in range(5000)) + b"}", "fields"),
        (filled(b":"), "values"),
        (filled(b'"",'), "strings"),
        (filled(b'"\\"",'), "strings"),
        (filled(b'"\\\\",'), "strings"),
        (filled(b"1,"), "values"),
        (b"[" * 101 + b"]" * 101, "too deeply"),
        (b'[{"a":' * 60 + b"1" + b"}]" * 60, "too deeply"),
    ],
)
def test_values_are_counted_before_they_are_made(raw: bytes, word: str) -> None:
    with pytest.raises(BadRequest, match=word):
        json_values.loads(raw)


@pytest.mark.parametrize("before", [b"[" * 16_000, (b"[" * 100 + b"]" * 100) * 160], ids=["deep", "in groups"])
def test_brackets_that_close_nothing_cost_no_more_than_others(before: bytes) -> None:
    def cpu_s(raw: bytes) -> float:
        began_s = time.thread_time()
        with pytest.raises((BadRequest, ValueError)):
            json_values.loads(raw)
        return time.thread_time() - began_s

    usual_s = min(cpu_s(filled(b"[],")) for _ in range(3))
    assert min(cpu_s(before + b"]" * (MAX_BODY - len(before))) for _ in range(3)) <= 12 * usual_s


@pytest.mark.parametrize(
    "raw",
    [
        filled(b"123456,"),
        filled(b"[1,", b'["', b'"]'),  # brackets within strings are not lists
        filled(b'\\",', b'["', b'."]'),
        b"[" * 100 + b"]" * 100,
        b"[" + b",".join([b"[]"] * 16_000) + b"]",
        b'{"a":"' + b"[" * 1000 + b'"}',
    ],
)
def test_large_values_that_are_few_enough_are_read(raw: bytes) -> None:
    assert json_values.loads(raw) == json.loads(raw)


HEAVY = {
    "floats": filled(b"1.5,"),
    "integers": filled(b"300,"),
    "objects": b"[" + b",".join(b'{"%d":"%d"}' % (i, i) for i in range(16_000)) + b"," + b"1.5," * 700_000 + b"1]",
    "strings": b"[" + b",".join(b'"%d\xc3\xa9"' % i for i in range(65_000)) + b"," + b"1.5," * 500_000 + b"1]",
    "a wide text": b'["' + ("😀" + "a" * 1000).encode() * 4000 + b'"]',
}


@pytest.mark.parametrize("kind", examples.some(HEAVY, "objects", "a wide text"))
def test_values_take_a_known_multiple_of_their_bytes(kind: str) -> None:
    """As documented in docs/reliability.md."""
    raw = HEAVY[kind]
    tracemalloc.start()
    try:
        value = json_values.loads(raw)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(value)
    assert held <= 12 * len(raw)
    assert peak <= 25 * len(raw)


def test_what_is_kept_is_read_whatever_it_has() -> None:
    for value in ({"a": [1]}, [[]] * (json_values.MAX_CONTAINERS + 1), {"items": [{"text": "a"}] * 20_000}):
        assert json_values.loads_kept(orjson.dumps(value)) == value
    with pytest.raises(orjson.JSONDecodeError):
        json_values.loads_kept(b"[" * 20_000)
