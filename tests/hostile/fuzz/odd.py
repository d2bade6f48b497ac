"""Odd values that all targets use."""

from __future__ import annotations

import json
import re
from typing import Any

from hypothesis import strategies as st

from protocol.wire.errors import LorafleetError

TEXTS = ("", "\0", "\u202e", "a" * 3000, "null", "-1", "1e999", "base", "__proto__", "../..", "{{", "\ufeff", "😀" * 40)
NUMBERS = (0, -1, 1, 2, 7, 1 << 31, 1 << 53, (1 << 63) - 1, 0.5, -0.0, 1e308, -1e308)
HUGE = (1 << 63, -(1 << 64), 10**400, float("inf"), float("nan"))
"""Numbers that some JSON writers emit, and msgpack cannot represent."""

texts = st.one_of(st.sampled_from(TEXTS), st.text(max_size=12))
numbers = st.sampled_from(NUMBERS)
plain = st.one_of(st.none(), st.booleans(), numbers, texts)


def nested(leaves: st.SearchStrategy[Any], max_leaves: int = 10) -> st.SearchStrategy[Any]:
    """Return a strategy for nested lists and objects with these leaves."""
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
        max_leaves=max_leaves,
    )


values = nested(plain)
"""JSON values."""

wild_values = nested(st.one_of(plain, st.sampled_from([*HUGE, "\ud800"])))
"""JSON values, and numbers and texts that are not valid JSON."""


def written(value: Any) -> bytes:
    """Return a value as JSON, or as lenient writers encode it."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


@st.composite
def damaged(draw: st.DrawFn, raws: st.SearchStrategy[bytes]) -> bytes:
    """Draw bytes with some parts replaced, truncated, doubled or inserted."""
    raw = bytearray(draw(raws))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(raw)))
        how = draw(st.sampled_from(["flip", "cut", "insert", "double", "drop"]))
        if how == "flip" and at < len(raw):
            raw[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del raw[at:]
        elif how == "insert":
            raw[at:at] = draw(st.binary(max_size=9))
        elif how == "double":
            raw[at:at] = raw[at : at + 40]
        elif how == "drop":
            del raw[at : at + draw(st.integers(1, 9))]
    return bytes(raw)


MAX_MESSAGE = 20_000
"""Maximum length of an error message: one that repeats its input without limit is itself an attack."""


def kind_of(error: LorafleetError) -> str:
    """Return the kind of a refusal: the first words of its message, without parts quoted from the input."""
    assert error.message
    assert len(error.message) <= MAX_MESSAGE, f"a message of {len(error.message)} characters"
    text = re.sub(r"'(?:[^'\\\\]|\\\\.)*'|\"(?:[^\"\\\\]|\\\\.)*\"|[0-9.+-]*[0-9]|`[^`]*`", "…", error.message[:400])
    return f"{type(error).__name__}: {' '.join(text.split()[:7])}"
