"""Values in messages are short, and long ones are not formatted completely first."""

from __future__ import annotations

import ast
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from protocol.wire.brief import brief

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("value", ["a", "it's", "", 5, 1.5, None, True, [1, "b"], {"a": [1]}, {"b": 1, "a": 2}])
def test_short_values_are_shown_as_python_writes_them(value: Any) -> None:
    assert brief(value) == repr(value)


@pytest.mark.parametrize(
    "value",
    ["a" * 4_000_000, [1] * 1_000_000, {f"k{i}": i for i in range(100_000)}, [["b" * 1000] * 1000] * 1000, 10**50],
    ids=["text", "list", "object", "lists", "number"],
)
def test_long_values_are_cut_before_they_are_written(value: Any) -> None:
    tracemalloc.start()
    try:
        assert len(brief(value)) <= 100
        assert tracemalloc.get_traced_memory()[1] < 20_000
    finally:
        tracemalloc.stop()
    assert len(brief(value, 20)) <= 20


def test_the_gateway_writes_no_whole_value_into_a_message() -> None:
    """`{value!r:.100}` formats the whole value first, on the event loop."""
    paths = sorted((ROOT / "gateway").rglob("*.py"))
    assert paths
    whole = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FormattedValue) and node.conversion == ord("r") and node.format_spec is not None
    ]
    assert whole == []
