"""The outline of a JSON text is read by msgspec with the same values and errors as the text itself."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.bodies import json_outline
from gateway.bodies.json_outline import LONG_BYTES, MAX_OPEN, MAX_PARTS, Outline, TooManyFields
from gateway.bodies.json_values import PIECE_BYTES

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=6) | st.sampled_from(['"\\', "\\" * 3, "[{,:"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4), max_leaves=30,
)  # fmt: skip
LEVELS = 2


class Fields(msgspec.Struct):
    """The fields to read."""

    a: msgspec.Raw = msgspec.Raw(b"null")
    b: msgspec.Raw = msgspec.Raw(b"null")


def outlined(value: Any, level: int = 1) -> Any:
    """Return the value that an outline keeps of a value."""
    if isinstance(value, list):
        return []
    if isinstance(value, dict):
        return {key: outlined(inner, level + 1) for key, inner in value.items()} if level <= LEVELS else {}
    return value


def passed_over(raw: bytes | bytearray) -> None:
    msgspec.json.decode(raw, type=msgspec.Raw)


def error_of(read: Any, raw: bytes) -> str:
    """Return the error of reading a text, or "" without one."""
    try:
        read(raw)
    except msgspec.DecodeError as error:
        return str(error)
    return ""


@given(VALUES, st.integers(1, 40), st.sampled_from([None, 1]))
def test_what_is_not_deep_is_kept(value: Any, piece_bytes: int, indent: int | None) -> None:
    raw = json.dumps(value, indent=indent).encode()
    if len(raw) <= piece_bytes // 4:
        return
    assert orjson.loads(Outline(raw, LEVELS, piece_bytes=piece_bytes).text) == outlined(value)


@given(VALUES, VALUES, st.integers(1, 40))
def test_values_are_found_in_the_text(one: Any, other: Any, piece_bytes: int) -> None:
    raw = orjson.dumps({"other": [one], "a": one, "x": {"y": other}, "b": other})
    outline, whole = Outline(raw, LEVELS, piece_bytes=piece_bytes), msgspec.json.decode(raw, type=Fields)
    found = msgspec.json.decode(outline.text, type=Fields)
    for name in ("a", "b"):
        begin, end = outline.span(getattr(found, name))
        assert raw[begin:end] == bytes(getattr(whole, name))


@settings(max_examples=300)
@given(VALUES, st.integers(1, 40), st.randoms(use_true_random=False))
def test_it_is_json_where_the_text_is(value: Any, piece_bytes: int, chance: random.Random) -> None:
    raw = bytearray(orjson.dumps(value))
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(raw) + 1)
        raw[at : at + chance.randint(0, 2)] = chance.choice(
            [b"", b",", b"]", b"}", b"[", b'"', b"\\", b":", b" ", b"0"]
        )
    text = bytes(raw)
    found = error_of(lambda raw: passed_over(Outline(raw, LEVELS, piece_bytes=piece_bytes).text), text)
    assert bool(found) == bool(error_of(passed_over, text)), (found, text)


@pytest.mark.parametrize("broken", [b"[1 2]", b"[nul]", b'{"a" 1}', b'["\\x"]', b"[01]"])
def test_it_says_what_is_wrong_and_where(broken: bytes) -> None:
    rows = b'{"a":[],"b":{"c":1}},' * 10_000
    raw = b'{"a":[%b%b,%b1],"b":1}' % (rows, broken, rows)
    whole = error_of(passed_over, raw)
    assert error_of(lambda raw: Outline(raw, LEVELS), raw) == whole != ""


def test_long_strings_are_left_out_and_others_kept() -> None:
    short, long = "s" * (LONG_BYTES - 100), '"\\ü' * PIECE_BYTES
    raw = json.dumps({"a": long, "b": short, long: {"b": long, "a": short}}).encode()
    found = orjson.loads(Outline(raw, LEVELS).text)
    assert found == {"a": "", "b": short, "": {"b": "", "a": short}}


@pytest.mark.parametrize("blanks", [b"", b" " * (LONG_BYTES + 900)])
def test_blanks_around_a_short_string_do_not_make_it_long(blanks: bytes) -> None:
    filler = b'"' + b"x" * (LONG_BYTES + 900) + b'"'
    raw = blanks.join((b"", b'{"a"', b":", b'"m"', b',"f":' + filler, b',"b"', b":", b"true", b"}"))
    found = orjson.loads(Outline(raw + b" " * PIECE_BYTES, LEVELS).text)
    assert found in ({"a": "m", "f": "", "b": True}, {"a": "m", "f": filler[1:-1].decode(), "b": True})


def test_nesting_across_pieces_is_too_deep_for_every_python() -> None:
    raw = b'{"p":"%b","a":%b1%b}' % (b"y" * (PIECE_BYTES - 1500), b"[" * 1400, b"]" * 1400)
    with pytest.raises(RecursionError):
        Outline(raw, LEVELS)


def test_too_many_fields_and_levels_are_refused() -> None:
    for fields in (b'"a":[],' * 8 * MAX_PARTS, b'"a":1,' * 100_000, b" " * 300_000):
        with pytest.raises(TooManyFields):
            Outline(b'{"a":{%b"b":1}}' % fields, LEVELS)
        assert Outline(b'{"a":[{%b"b":1}]}' % fields, LEVELS).text == b'{"a":[]}'
    for depth in (MAX_OPEN + 1, 1_000_000):
        with pytest.raises(RecursionError):
            Outline(b'{"a":%b1%b}' % (b"[" * depth, b"]" * depth) + b" " * PIECE_BYTES, LEVELS)


def test_no_piece_of_a_text_is_read_at_once_but_a_string(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    decode = msgspec.json.decode

    def noted(raw: bytes, **options: Any) -> Any:
        sizes.append(len(raw))
        return decode(raw, **options)

    monkeypatch.setattr(json_outline.msgspec, "json", type("json", (), {"decode": staticmethod(noted)}))
    raw = b'{"a":[%b1]}' % (b'[],{"b":[1,2]},' * 100_000)
    assert len(Outline(raw, LEVELS).text) < 100
    assert len(raw) <= sum(sizes) < 2 * len(raw)
    assert max(sizes) <= 2 * PIECE_BYTES
