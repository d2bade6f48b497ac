"""Structural tags: free text, the content required after a trigger, and specific errors."""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers.factories import make_tokenizer
from llguidance import LLMatcher, LLTokenizer

from gateway.grammars.notation import grammar_text
from gateway.grammars.structural_tags import MAX_DEPTH, MAX_FORMATS
from gateway.grammars.structured import constraint_of
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest

SETTINGS = Settings()
TOKENIZER = make_tokenizer().backend_tokenizer
VOCABULARY = LLTokenizer(TOKENIZER.to_str(), eos_token=0)

X: dict[str, Any] = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
Y: dict[str, Any] = {"type": "object", "properties": {"y": {"type": "string"}}, "required": ["y"]}
TEXT: dict[str, Any] = {"type": "any_text"}


def const(value: str) -> dict[str, Any]:
    return {"type": "const_string", "value": value}


def schema(of: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": of}


def tag(begin: str, content: Any, end: Any, **more: Any) -> dict[str, Any]:
    return {"type": "tag", "begin": begin, "content": content, "end": end, **more}


def triggered(*tags: Any, triggers: Any = ("<f=",), **more: Any) -> dict[str, Any]:
    return {"type": "triggered_tags", "triggers": list(triggers), "tags": list(tags), **more}


def separated(*tags: Any, separator: Any = ", ", **more: Any) -> dict[str, Any]:
    return {"type": "tags_with_separator", "separator": separator, "tags": list(tags), **more}


def some(kind: str, *elements: Any) -> dict[str, Any]:
    return {"type": kind, "elements": list(elements)}


def matcher_of(form: dict[str, Any]) -> LLMatcher:
    constraint = constraint_of({"type": "structural_tag", **form}, None, SETTINGS)
    assert constraint is not None
    assert constraint == constraint_of(None, {"structural_tag": json.dumps(form)}, SETTINGS)
    assert constraint == constraint_of(None, {"structural_tag": {"type": "structural_tag", **form}}, SETTINGS)
    matcher = LLMatcher(VOCABULARY, grammar_text(constraint))
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def takes(form: dict[str, Any], text: str) -> bool:
    """Return whether a text matches a form, token by token."""
    matcher = matcher_of(form)
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


CALLS = [tag("<f=a>", schema(X), "</f>"), tag("<f=b>", schema(Y), "</f>")]
ONE, OTHER = '<f=a>{"x": 1}</f>', '<f=b>{"y": "z"}</f>'
OLD = {
    "structures": [{"begin": "<f=a>", "schema": X, "end": "</f>"}, {"begin": "<f=b>", "schema": Y, "end": "</f>"}],
    "triggers": ["<f="],
}
THINKING = some("sequence", tag("<think>", TEXT, "</think>"), some("or", const("yes"), schema(X), const("no")))

CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    (
        "as it was",
        OLD,
        ["", "text", ONE, f"a {ONE} b {OTHER}{ONE} c <", "<f"],
        ["<f=c>", '<f=a>{"y": "z"}</f>', "<f=a>"],
    ),
    ("a text", {"format": const("Berlin.")}, ["Berlin."], ["", "Berlin", "Berlin. "]),
    ("a schema", {"format": schema(X)}, ['{"x": 12}'], ["{}", '{"x": 12, "y": 1}', 'a {"x": 12}']),
    ("an expression", {"format": {"type": "regex", "pattern": "[0-9]+/a"}}, ["12/a"], ["/a", "12/b"]),
    ("any text", {"format": TEXT}, ["", "a\nb"], []),
    ("a tag", {"format": tag("<t>", TEXT, "</t>")}, ["<t></t>", "<t>a<b\n</t>"], ["", "<t>a", "<t>a</t>b", "a<t></t>"]),
    ("ends of a tag", {"format": tag("(", TEXT, ["]", "}"])}, ["(a]", "(a)}"], ["(a", "(a]}", "(a)"]),
    ("a tag without an end", {"format": tag("Answer: ", TEXT, "")}, ["Answer: ", "Answer: a"], ["a", "Answer"]),
    (
        "one after the other",
        {"format": THINKING},
        ["<think>a</think>no", '<think></think>{"x": 1}'],
        ["no", "<think>a</think>a"],
    ),
    ("triggered", {"format": triggered(*CALLS)}, ["", "text", f"a {ONE} b {OTHER}"], ["a <f=c>", f"{ONE}<f="]),
    ("at least one", {"format": triggered(*CALLS, at_least_one=True)}, [ONE, f"a{OTHER}b{ONE}"], ["", "a", "a <f"]),
    (
        "the first alone",
        {"format": triggered(*CALLS, stop_after_first=True)},
        ["", "a", f"a{ONE}"],
        [f"{ONE}a", f"{ONE}{ONE}"],
    ),
    (
        "the first alone, and that",
        {"format": triggered(*CALLS, stop_after_first=True, at_least_one=True)},
        [ONE, f"a{OTHER}"],
        ["", "a", f"{ONE}a"],
    ),
    (
        "two triggers, one of which is a whole beginning",
        {"format": triggered(CALLS[0], tag("[b]", const("c"), ""), triggers=["<f=", "[b]"])},
        [f"a{ONE}[b]cd[b]c"],
        ["[b]d", "a[b]"],
    ),
    (
        "triggered within a tag",
        {"format": tag("<all>", triggered(*CALLS), "</all>")},
        ["<all></all>", f"<all>a{ONE}b</all>"],
        [f"<all>a{ONE}b", "<all></all>a"],
    ),
    (
        "separated",
        {"format": separated(*CALLS)},
        ["", ONE, f"{ONE}, {OTHER}, {ONE}"],
        [f"{ONE},", f"{ONE}{OTHER}", "a"],
    ),
    (
        "one of them",
        {"format": separated(*CALLS, stop_after_first=True, at_least_one=True)},
        [ONE, OTHER],
        ["", f"{ONE}, {ONE}"],
    ),
]


@pytest.mark.parametrize(("form", "right", "wrong"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_texts_follow_their_tags(form: dict[str, Any], right: list[str], wrong: list[str]) -> None:
    assert [text for text in right if not takes(form, text)] == []
    assert [text for text in wrong if takes(form, text)] == []


def within(form: dict[str, Any], times: int) -> dict[str, Any]:
    for _ in range(times):
        form = some("or", form)
    return form


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "response_format of type 'structural_tag' needs format, or structures and triggers"),
    ({"format": TEXT, **OLD}, "needs format, or structures and triggers"),
    ({"structures": OLD["structures"]}, "needs format, or structures and triggers"),
    ({"format": TEXT, "schema": X}, "response_format.schema has no effect with the type 'structural_tag'"),
    ({"format": "text"}, "response_format.format must be of one of the types any_text, .*; it is 'text'"),
    ({"format": {"type": "grammar", "grammar": "a"}}, "must be of one of the types .*; it is 'grammar'"),
    ({"format": {"type": ["tag"]}}, "must be of one of the types"),
    ({"format": {**TEXT, "excludes": ["a"]}}, "response_format.format.'excludes' is not supported"),
    ({"format": {"type": "const_string"}}, "response_format.format.value must be a text, and not empty"),
    ({"format": schema(True)}, "response_format.format.json_schema must be an object"),
    ({"format": {"type": "regex", "pattern": "(a{999}){999}"}}, "more than 100000 parts"),
    ({"format": some("sequence")}, "elements must be a list, and not empty"),
    ({"format": some("sequence", TEXT, const("a"))}, r"elements\[0\]: any_text must be the last"),
    ({"format": some("sequence", triggered(*CALLS), TEXT)}, r"elements\[0\]: triggered_tags must be the last"),
    ({"format": tag("a", TEXT, 1)}, "response_format.format.end must be a list"),
    ({"format": tag("a", TEXT, ["a", ""])}, "end must be a list of texts that are not empty"),
    ({"format": tag("a", TEXT, [1])}, "end must be a text, or a list of texts"),
    ({"format": tag("a", None, "b")}, "response_format.format.content must be of one of the types"),
    (
        {"format": triggered(*CALLS, triggers=["<g="])},
        r"tags\[0\].begin must begin with exactly one trigger; it has none",
    ),
    ({"format": triggered(*CALLS, triggers=["<", "<f"])}, "exactly one trigger; it has '<' and '<f'"),
    ({"format": triggered(*CALLS, triggers=["<f=", "["])}, r"triggers: no tag begins with '\['"),
    ({"format": triggered(*CALLS, triggers=[])}, "triggers must be a list, and not empty"),
    ({"format": triggered(*CALLS, triggers=[""])}, "triggers must be a list of texts that are not empty"),
    ({"format": triggered(TEXT)}, r"tags\[0\] must be a tag: begin, content and end"),
    ({"format": triggered(*CALLS, at_least_one="yes")}, "at_least_one must be true or false"),
    ({"format": separated(*CALLS, separator=None)}, "separator must be a text"),
    (
        {**OLD, "structures": [{"begin": "a", "end": "b"}]},
        r"structures\[0\] must be an object with begin, schema and end",
    ),
    ({"format": some("or", *[TEXT] * MAX_FORMATS)}, f"has {MAX_FORMATS + 1} formats, triggers and ends; the limit is"),
    ({"format": triggered(*CALLS, triggers=["<f="] * MAX_FORMATS)}, "formats, triggers and ends; the limit is"),
    ({"format": tag("a", TEXT, ["b"] * MAX_FORMATS)}, "formats, triggers and ends; the limit is"),
    ({"format": within(TEXT, MAX_DEPTH)}, f"is within {MAX_DEPTH} other formats, which is the limit"),
    ({"format": const("a" * SETTINGS.max_grammar_bytes)}, "bytes; the limit is 65536"),
]


@pytest.mark.parametrize(("form", "why"), REFUSED)
def test_what_is_no_structural_tag_is_refused_by_name(form: dict[str, Any], why: str) -> None:
    with pytest.raises(BadRequest, match=why) as refused:
        constraint_of({"type": "structural_tag", **form}, None, SETTINGS)
    assert (refused.value.param or "").startswith("response_format")


@pytest.mark.parametrize("value", ["[]", "{", "{}", '{"type": "text"}', '{"format": {"type": "any_text"}, "a": 1}', 1])
def test_a_structural_tag_as_text_is_parsed_and_checked(value: Any) -> None:
    with pytest.raises(BadRequest, match=r"structured_outputs\.structural_tag"):
        constraint_of(None, {"structural_tag": value}, SETTINGS)


def test_the_deepest_and_largest_that_is_let_in_compiles() -> None:
    for form in (within(TEXT, MAX_DEPTH - 1), some("or", *[const("a")] * (MAX_FORMATS - 1))):
        matcher_of({"format": form})
