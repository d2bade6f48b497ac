"""Grammars of unbounded cost are refused before anything compiles them; reasonable ones are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import reduce
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.grammars import limits as g
from gateway.grammars.schemas import JSON_STYLE, MAX_VALUES, check_schema
from gateway.grammars.structured import check_lark, constraint_of, native_constraint
from gateway.tools.definitions import tools_of
from gateway.tools.xml_calls import arguments_rules
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest

SETTINGS = Settings()


@pytest.mark.parametrize(
    ("pattern", "num"),
    [
        ("abc", 3),
        ("a{3}b*", 4),
        ("(ab){3}", 6),
        ("((ab){10}c){100}", 2100),
        ("a{2,}|b{,5}", 8),
        ("a{0}", 1),
        (r"\{10\}", 4),
        (r"\x{1000000}\p{Greek}", 2),
        ("[a{9}]{2}", 2),
        ("[]{10}]{5}", 5),
        (r"[\]{10}]{5}", 5),
        (")){5}", 6),
        ("(((a", 1),
        ("{5}", 0),
        ("[", 1),
        ("\\", 1),
        (str(JSON_STYLE["whitespace_pattern"]), 34),
        ("(a{1000}){1000}", g.MAX_PARTS + 1),
        ("a{" + "9" * 60_000 + "}", g.MAX_PARTS + 1),
    ],
)
def test_parts_of_a_regex_are_counted_as_written_out(pattern: str, num: int) -> None:
    assert g.num_parts(pattern) == num


@given(st.text(alphabet="ab(){}[]\\^|*,0123x", max_size=60))
def test_any_text_has_some_number_of_parts(pattern: str) -> None:
    assert 0 <= g.num_parts(pattern) <= g.MAX_PARTS + 1


BOMB = "(a{1000}){1000}"
SCHEMAS: list[tuple[Any, str]] = [
    ({"pattern": BOMB}, "more than 100000 parts"),
    ({"properties": {"pattern": {"items": [{"pattern": BOMB}]}}}, "more than 100000 parts"),
    ({"patternProperties": {BOMB: {}}}, "more than 100000 parts"),
    ({"$defs": {"enum": {"anyOf": [{"pattern": BOMB}]}}}, "more than 100000 parts"),
    ({"enum": list(range(g.MAX_CHOICES + 1))}, "values in enum; the limit is"),
    ({"a": [0] * (MAX_VALUES + 1)}, "values; the limit is"),
    ({"a": [[]] * (MAX_VALUES + 1)}, "values; the limit is"),
    (reduce(lambda inner, _: {"not": inner}, range(64), {}), "deeper than 64 levels"),
    ({"x-guidance": {"whitespace_pattern": " " * 257}}, "257 bytes; the limit is 256"),
    ({"x-guidance": {"whitespace_pattern": BOMB}}, "more than 100000 parts"),
]


@pytest.mark.parametrize(("schema", "said"), SCHEMAS)
def test_schemas_beyond_the_limits_are_refused(schema: Any, said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        check_schema(schema, "here", SETTINGS)
    text = json.dumps(schema)
    for grammar in (f"start: %json {text}", f'A: "/"\nstart: A %json{text} // %json'):
        with pytest.raises(BadRequest, match=said):
            check_lark(grammar, "here", SETTINGS)


def test_what_is_no_schema_is_no_keyword() -> None:
    data = {"pattern": BOMB}
    check_schema({"default": data, "const": {"a": [data]}, "enum": [data]}, "here", SETTINGS)
    check_schema({"default": {"enum": [0] * (g.MAX_CHOICES + 1)}}, "here", SETTINGS)
    check_schema({"properties": {"enum": {"type": "integer"}, "pattern": {}}}, "here", SETTINGS)
    check_schema({"maxItems": (1 << 63) - 1, "pattern": 5, "enum": "a", "patternProperties": []}, "here", SETTINGS)


@pytest.mark.parametrize(
    ("text", "good"),
    [
        (f"start: /{BOMB}/", False),
        ("start: (a{1000}){1000}\na: /a/", False),
        ("start: A{1000000}\nA: /a/", False),
        (f'start: "{BOMB}" // {BOMB}', True),
        (r'start: "\"(" /[\/"]{3}/ "){9999999}"', True),
        ("start: %json {", True),  # the compiler reports the error
        (f"start: %json {'[' * 100_000}", True),
        ('start: (item_with_a_long_name ", "){1000}\nitem_with_a_long_name: /[a-z]{1,200}/', True),
    ],
)
def test_grammars_of_lark_are_looked_through(text: str, good: bool) -> None:
    if good:
        check_lark(text, "here", SETTINGS)
    else:
        with pytest.raises(BadRequest, match="more than 100000 parts"):
            check_lark(text, "here", SETTINGS)


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"regex": BOMB}, "structured_outputs.regex: .* parts"),
        ({"grammar": f"start: /{BOMB}/"}, "structured_outputs.grammar: .* parts"),
        ({"json_object": True, "whitespace_pattern": "a" * 257}, "whitespace_pattern has 257 bytes; the limit is 256"),
        ({"json_object": True, "whitespace_pattern": BOMB}, "whitespace_pattern: .* parts"),
        ({"choice": ["a"] * 10_001}, "10001 choices; the limit is 10000"),
        ({"json": json.dumps({"a": "b" * 70_000})}, "70009 bytes; the limit is 65536"),
    ],
)
def test_every_way_to_ask_for_a_form_is_bounded(wish: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        constraint_of(None, wish, SETTINGS)


@pytest.mark.parametrize("schema", [{"pattern": BOMB}, {"patternProperties": {BOMB: {}}}, {"enum": [0] * 10_001}])
def test_a_schema_that_is_too_large_is_not_looked_through(schema: dict[str, Any]) -> None:
    large = {**schema, "description": "d" * 70_000}
    for wishes in ((None, {"json": large}), ({"type": "json_object", "schema": large}, None)):
        with pytest.raises(BadRequest, match=r"\d+ bytes; the limit is 65536"):
            constraint_of(*wishes, SETTINGS)


def test_tools_are_bounded_together() -> None:
    schema = {"type": "object", "properties": {"a": {"description": "d" * 60_000}}}
    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": schema}} for i in range(18)]
    assert tools_of(tools[:17], "auto", None, SETTINGS) is not None
    with pytest.raises(BadRequest, match=r"tools has \d+ bytes; the limit is 1048576"):
        tools_of(tools, "auto", None, SETTINGS)


def test_tags_do_not_copy_shared_schemas_without_bound() -> None:
    names = {f"p{i}": {} for i in range(1000)}
    schema = {"type": "object", "properties": names, "$defs": {"a": {"description": "d" * 2000}}}
    with pytest.raises(BadRequest, match="and their copies; the limit is"):
        arguments_rules("f", schema, "args")


BIG: Any = [0] * 100_000
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    "refused",
    [
        lambda: constraint_of({"type": BIG}, None, SETTINGS),
        lambda: native_constraint({"type": BIG}, SETTINGS),
        lambda: tools_of([{"type": BIG}], None, None, SETTINGS),
        lambda: tools_of([TOOL], {"type": "function", "function": {"name": BIG}}, None, SETTINGS),
        lambda: tools_of([TOOL], {"type": BIG}, None, SETTINGS),
    ],
)
def test_a_refusal_quotes_little_of_a_large_value(refused: Callable[[], object]) -> None:
    with pytest.raises(BadRequest) as caught:
        refused()
    assert len(caught.value.message) < 250
