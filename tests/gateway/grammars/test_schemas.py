"""Objects in schemas are closed: only the named keys, each once; otherwise, the meaning of the schema is unchanged."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from helpers import examples
from helpers.factories import make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from llguidance import LLMatcher, LLTokenizer

from gateway.grammars.notation import grammar_text
from gateway.grammars.schemas import MAX_FREE_KEYS, checked_schema, closed
from gateway.grammars.structured import constraint_of
from gateway.tools.definitions import tools_of
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest

SETTINGS = Settings()
OPEN = Settings(close_objects=False)
TOKENIZER = make_tokenizer().backend_tokenizer
VOCABULARY = LLTokenizer(TOKENIZER.to_str(), eos_token=0)

INT, STR = {"type": "integer"}, {"type": "string"}
A: dict[str, Any] = {"type": "object", "properties": {"a": INT}, "required": ["a"]}
B: dict[str, Any] = {"type": "object", "properties": {"b": INT}, "required": ["b"]}


def matcher_of(schema: dict[str, Any]) -> LLMatcher:
    """Return a matcher of a closed schema."""
    matcher = LLMatcher(VOCABULARY, grammar_text({"json_schema": schema}))
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def takes(schema: dict[str, Any], value: Any, **how: Any) -> bool:
    """Return whether a value matches a schema, token by token."""
    matcher = matcher_of(checked_schema(schema, "schema", how.pop("settings", SETTINGS), **how))
    text = value if isinstance(value, str) else json.dumps(value)
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


CASES: list[tuple[str, dict[str, Any], list[Any], list[Any]]] = [
    ("plain", A, [{"a": 1}], [{"a": 1, "b": 2}, '{"a": 1, "a": 2}', {}]),
    ("no properties named", {"type": "object", "properties": {}}, [{}], [{"a": 1}]),
    ("free keys", {"type": "object"}, [{}, {"x": {"y": [1]}}], []),
    ("said to be open", {**A, "additionalProperties": True}, [{"a": 1, "x": [2]}], ['{"a": 1, "a": 2}']),
    ("others of a form", {**A, "additionalProperties": STR}, [{"a": 1, "x": "2"}], [{"a": 1, "x": 2}]),
    ("required, not listed", {**A, "required": ["a", "z"]},
     [{"a": 1, "z": "any"}], [{"a": 1}, {"a": 1, "z": 1, "y": 1}]),
    ("required alone", {"type": "object", "required": ["a"]}, [{"a": 1}, {"a": 1, "x": 2}], [{"x": 1}]),
    (
        "deep", {"type": "array", "items": {"type": "array", "prefixItems": [A], "items": {"properties": {"l": B}}}},
        [[[{"a": 1}, {"l": {"b": 2}}]]], [[[{"a": 1, "x": 1}]], [[{"a": 1}, {"l": {"b": 2, "x": 1}}]]],
    ),
    (
        "$ref", {"$defs": {"A": A}, "type": "object", "properties": {"p": {"$ref": "#/$defs/A", "description": "one"}}},
        [{"p": {"a": 1}}], [{"p": {"a": 1, "x": 1}}],
    ),
    (
        "definitions and a single allOf",
        {"definitions": {"A": A}, "properties": {"p": {"allOf": [{"$ref": "#/definitions/A"}], "default": None}}},
        [{"p": {"a": 1}}], [{"p": {"a": 1, "x": 1}}],
    ),
    ("recursion", {**A, "properties": {"a": INT, "next": {"$ref": "#"}}},
     [{"a": 1, "next": {"a": 2}}], [{"a": 1, "next": {"a": 2, "x": 3}}]),
    ("anyOf", {"anyOf": [A, B, {"type": "null"}]}, [{"a": 1}, {"b": 1}, "null"], [{"a": 1, "b": 2}]),
    ("oneOf", {"oneOf": [
        {"type": "object", "properties": {"kind": {"const": kind}, kind: INT}, "required": ["kind", kind]}
        for kind in ("x", "y")]}, [{"kind": "x", "x": 1}], [{"kind": "x", "y": 1}, {"kind": "y", "y": 1, "x": 2}]),
    ("allOf", {"allOf": [A, B]}, [{"a": 1, "b": 2}], [{"a": 1}, {"a": 1, "b": 2, "c": 3}, {"a": "x", "b": 2}]),
    ("allOf of references, which are used alone too",
     {"$defs": {"A": A, "AB": {"allOf": [{"$ref": "#/$defs/A"}, B]}},
      "properties": {"one": {"$ref": "#/$defs/A"}, "both": {"$ref": "#/$defs/AB"}}},
     [{"one": {"a": 1}, "both": {"a": 1, "b": 2}}], [{"one": {"a": 1, "b": 2}}, {"both": {"a": 1, "b": 2, "x": 3}}]),
    ("reference beside properties", {"$defs": {"A": A}, "$ref": "#/$defs/A", "properties": {"b": INT}},
     [{"a": 1, "b": 2}, {"a": 1}], [{"b": 2}, {"a": 1, "c": 2}]),
    ("anyOf beside properties", {"type": "object", "properties": {"c": INT}, "anyOf": [A, B]},
     [{"c": 0, "a": 1}, {"c": 0, "b": 1}], [{"c": 0}, {"c": 0, "a": 1, "x": 1}]),
    ("anyOf of required", {"properties": {"a": INT, "b": INT}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
     "type": "object"}, [{"a": 1}, {"b": 1}, {"a": 1, "b": 1}], [{}, {"a": 1, "x": 1}]),
    ("a part says that it is open", {"allOf": [{**A, "additionalProperties": True}, B]},
     [{"a": 1, "b": 2, "x": 3}], []),
    ("patterns", {"type": "object", "properties": {"a": INT}, "patternProperties": {"^x_": STR}},
     [{"a": 1, "x_1": "s"}], [{"a": 1, "y": "s"}, {"x_1": 1}]),
    ("const and enum", {"properties": {"p": {"const": {"a": 1, "b": [{"c": 2}]}}, "q": {"enum": [{"z": 1}, None]}}},
     [{"p": {"a": 1, "b": [{"c": 2}]}, "q": {"z": 1}}, {"q": None}], [{"p": {"a": 1}}]),
    ("enum beside properties", {"enum": [{"a": 1, "b": 2}], "properties": {"a": INT}}, [], []),
    ("a property named properties", {"properties": {"properties": {"properties": {"required": STR}}}},
     [{"properties": {"required": "s"}}], [{"properties": {"x": 1}}, {"x": 1}]),
    ("white space", A, ['{ "a": 1 }', '{\n  "a": 1\n}'], ['{  "a": 1}', '{\n\n"a":1}', '{\t"a":1}']),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "good", "bad"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_objects_have_the_keys_that_are_named(schema: dict[str, Any], good: list[Any], bad: list[Any]) -> None:
    before = json.dumps(schema)
    for value in good:
        assert takes(schema, value), value
        Draft202012Validator(schema).validate(json.loads(value) if isinstance(value, str) else value)
    for value in bad:
        assert not takes(schema, value), value
    assert json.dumps(schema) == before


def test_an_enum_beside_properties_is_as_it_was() -> None:
    schema = {"enum": [{"a": 1, "b": 2}], "properties": {"a": INT}}
    assert closed(schema, "here", num_bytes=100) == schema


def test_a_setting_and_a_request_say_what_is_closed() -> None:
    more = {"a": 1, "x": 2}
    assert takes(A, more, settings=OPEN)
    assert not takes(A, more, settings=OPEN, strict=True)
    assert not takes(A, more, settings=OPEN, close=True)
    for wish, is_open in (({}, True), ({"disable_additional_properties": True}, False)):
        constraint = constraint_of(None, {"json": A, **wish}, OPEN)
        assert constraint is not None
        assert ("additionalProperties" not in constraint["json_schema"]) == is_open
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": A, "strict": True}}
    constraint = constraint_of(form, None, OPEN)
    assert constraint is not None
    assert constraint["json_schema"]["additionalProperties"] is False
    function = {"name": "f", "parameters": A}
    tools = tools_of([{"type": "function", "function": function}], None, None, SETTINGS)
    assert tools is not None
    assert tools.schemas["f"]["additionalProperties"] is False
    assert tools.definitions[0]["function"] == function  # the template shows the client's original


@pytest.mark.parametrize(
    ("schema", "strict", "said"),
    [
        ({**A, "additionalProperties": True}, True, "where strict is true, additionalProperties must be false"),
        ({"properties": {"p": {"additionalProperties": STR}}}, True, "additionalProperties must be false"),
        (A, "yes", "strict must be a boolean"),
    ],
)
def test_strict_is_what_openai_means(schema: dict[str, Any], strict: Any, said: str) -> None:
    function = {"name": "f", "parameters": {**schema, "type": "object"}, "strict": strict}
    form = {"type": "json_schema", "json_schema": {"schema": schema, "strict": strict}}
    with pytest.raises(BadRequest, match=said):
        tools_of([{"type": "function", "function": function}], None, None, SETTINGS)
    with pytest.raises(BadRequest, match=said):
        constraint_of(form, None, SETTINGS)


def test_free_keys_are_bounded_and_named_ones_stay_single() -> None:
    many = {f"k{i}": i for i in range(MAX_FREE_KEYS)}
    for schema in ({"type": "object"}, {"type": "object", "additionalProperties": INT}):
        assert takes(schema, many)
        assert not takes(schema, {**many, "more": 1})
    assert takes({"type": "object", "maxProperties": 300}, {**many, "more": 1})
    assert takes({"type": "object", "minProperties": 257}, {**many, "more": 1})
    assert takes({**A, "additionalProperties": True}, {"a": 1, **many})
    assert not takes({**A, "additionalProperties": True}, {"a": 1, **many, "more": 1})
    optional = {"type": "object", "properties": {"a": INT}, "additionalProperties": True}  # can't be bounded
    assert takes(optional, {"x": 1, "y": 2})


def test_closing_takes_no_longer_than_its_schema_is_large() -> None:
    wide = {f"k{i}": {} for i in range(2000)}
    group = {"allOf": [{"$ref": "#/$defs/wide"}, {"properties": {"x": {}}}]}
    schema = {"$defs": {"wide": {"properties": wide}}, "items": {"properties": {f"g{i}": group for i in range(300)}}}
    with pytest.raises(BadRequest, match="its schemas have so many references"):
        checked_schema(schema, "here", SETTINGS)
    chain: dict[str, Any] = {
        f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"properties": {f"p{i}": {}}}]} for i in range(700)
    }
    with pytest.raises(BadRequest, match="its schemas have so many references"):
        checked_schema({"$defs": chain, "$ref": "#/$defs/d0"}, "here", SETTINGS)
    flat = {"properties": {f"k{i}": {} for i in range(5000)}}
    assert checked_schema(flat, "here", SETTINGS)["additionalProperties"] is False


@pytest.mark.parametrize(
    "schema",
    [
        {"$defs": {"open0": A}, "allOf": [{"$ref": "#/$defs/open0"}, B]},
        {"properties": [], "allOf": [A, B]},
        {"properties": {"a": 5, "b": True}, "required": [1, "a"], "allOf": 3, "anyOf": [True, 4]},
        {"$ref": 5, "properties": {}},
        {"$ref": "#/properties/0/~1/9", "properties": {}},
        {"allOf": [{"$ref": "#/allOf/0"}, {"$ref": "#"}, {"properties": {}}]},
        {"type": ["object", {}], "minProperties": "a", "required": {}},
        {"patternProperties": 3, "additionalProperties": 4, "items": [A, 3], "enum": 4},
    ],
)
def test_whatever_a_schema_holds_closing_it_ends(schema: dict[str, Any]) -> None:
    for strict in (False, True):
        try:
            checked_schema(schema, "here", SETTINGS, strict=strict)
        except BadRequest:
            assert strict


def test_defs_of_another_kind_are_refused() -> None:
    with pytest.raises(BadRequest, match="must be an object"):
        checked_schema({"$defs": [], "allOf": [A, B]}, "here", SETTINGS)


# ---------------------------------------------------------------- any schema

NAMES = st.sampled_from(["a", "b", "c", "é", "$ref", "a b"])
LEAVES = st.sampled_from(
    [(INT, 3), (STR, 'x"\n'), ({"enum": ["p", 7]}, 7), ({"type": "null"}, None), ({"const": {"k": [1]}}, {"k": [1]})]
)


@st.composite
def schemas(draw: st.DrawFn, depth: int = 3, defs: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """Return a schema, adding its definitions to `defs`, with a value that has only the named keys."""
    assert defs is not None
    kind = draw(st.sampled_from(["leaf", "list", "object", "object", "ref", "all", "any"])) if depth else "leaf"
    if kind == "leaf":
        return draw(LEAVES)
    if kind == "list":
        schema, value = draw(schemas(depth=depth - 1, defs=defs))
        return {"type": "array", "items": schema}, [value] * draw(st.integers(0, 2))
    if kind == "any":
        inner = [draw(schemas(depth=depth - 1, defs=defs)) for _ in range(2)]
        return {"anyOf": [schema for schema, _ in inner]}, draw(st.sampled_from(inner))[1]
    if kind == "all":
        names = draw(st.lists(NAMES, min_size=2, max_size=4, unique=True))
        parts = [draw(objects(half, depth, defs)) for half in (names[:1], names[1:])]
        listed = [part for part, _ in parts]
        if draw(st.booleans()):
            defs[name := f"d{len(defs)}"] = listed[0]
            listed[0] = {"$ref": f"#/$defs/{name}"}
        return {"allOf": listed}, parts[0][1] | parts[1][1]
    schema, value = draw(objects(draw(st.lists(NAMES, max_size=3, unique=True)), depth, defs))
    if kind == "ref":
        defs[name := f"d{len(defs)}"] = schema
        return {"$ref": f"#/$defs/{name}"}, value
    return schema, value


@st.composite
def objects(draw: st.DrawFn, names: list[str], depth: int, defs: dict[str, Any]) -> tuple[Any, Any]:
    """Return the schema of an object with a value."""
    inner = {name: draw(schemas(depth=depth - 1, defs=defs)) for name in names}
    required = [name for name in names if draw(st.booleans())]
    schema = {"type": "object", "properties": {name: one for name, (one, _) in inner.items()}, "required": required}
    value = {name: one for name, (_, one) in inner.items() if name in required or draw(st.booleans())}
    return schema, value


@st.composite
def roots(draw: st.DrawFn) -> tuple[dict[str, Any], Any]:
    defs: dict[str, Any] = {}
    schema, value = draw(schemas(defs=defs))
    return {**schema, "$defs": defs}, value


def single(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object, whose keys must be unique."""
    assert len({key for key, _ in pairs}) == len(pairs), pairs
    return dict(pairs)


def random_answer(matcher: LLMatcher, seed: int, most: int) -> str | None:
    """Return a random answer that a grammar allows, or None if it is unfinished after `most` tokens."""
    rng, ids = random.Random(seed), list[int]()
    for _ in range(most):
        mask = matcher.compute_bitmask()
        allowed = [i for i in range(VOCABULARY.vocab_size) if mask[i // 8] >> i % 8 & 1]
        token = rng.choice(allowed)
        if token == 0 or not matcher.consume_token(token):
            break
        ids.append(token)
        if matcher.is_stopped():
            break
    return TOKENIZER.decode(ids) if matcher.is_accepting() else None


@settings(max_examples=examples.of(150), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(roots(), st.integers(0, 1 << 30))
def test_any_answer_is_valid_and_what_is_meant_stays(case: tuple[dict[str, Any], Any], seed: int) -> None:
    schema, value = case
    matcher = LLMatcher(VOCABULARY, grammar_text({"json_schema": checked_schema(schema, "here", SETTINGS)}))
    if matcher.is_error():  # llguidance can't express the schema, whether closed or open
        assert LLMatcher(VOCABULARY, grammar_text({"json_schema": schema})).is_error(), (schema, matcher.get_error())
        return
    text = json.dumps(value, ensure_ascii=False)
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    whole = matcher.deep_copy()
    assert whole.try_consume_tokens(ids) == len(ids), (schema, text)
    assert whole.is_accepting()
    answer = random_answer(matcher, seed, 300)
    if answer is not None:
        found = json.loads(answer, object_pairs_hook=single)
        Draft202012Validator(schema).validate(found)
        Draft202012Validator(with_names_only(schema)).validate(found)


def with_names_only(schema: Any, *, alone: bool = True) -> Any:
    """Return a schema that forbids other properties with JSON Schema's own keywords."""
    if not isinstance(schema, dict) or "const" in schema:
        return schema
    result = {**schema, "unevaluatedProperties": False} if alone and "anyOf" not in schema else dict(schema)
    for key in ("properties", "$defs"):
        inner = schema.get(key, {})
        result[key] = {name: with_names_only(part, alone=key == "properties") for name, part in inner.items()}
    for key in ("allOf", "anyOf"):
        if key in schema:
            result[key] = [with_names_only(part, alone=key == "anyOf") for part in schema[key]]
    if "items" in schema:
        result["items"] = with_names_only(schema["items"])
    return result


def test_an_adversary_never_finds_another_key() -> None:
    """Random answers with many seeds, for the schemas above."""
    for _, schema, good, _ in CASES:
        if not good or "additionalProperties" in json.dumps(schema) or schema in ({"type": "object"},):
            continue
        for seed in range(20):
            answer = random_answer(matcher_of(checked_schema(schema, "here", SETTINGS)), seed, 200)
            if answer is not None:
                Draft202012Validator(schema).validate(json.loads(answer, object_pairs_hook=single))
