"""Output forms and parameters of vLLM, SGLang and TGI have the same effect as there, on both routes."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest
from helpers.good_bodies import CHAT, COMPLETION
from helpers.openai_events import events_of, text_of
from helpers.scripted_fleet import MAX_MODEL_LEN, Script, ScriptedFleet
from tokenizers import Tokenizer

from gateway.grammars.schemas import JSON_STYLE, MAX_FREE_KEYS

ROUTES = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETION}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ANY, CLOSED = {"type": "object", "maxProperties": MAX_FREE_KEYS}, {**SCHEMA, "additionalProperties": False}
JSON = {"json_schema": {**CLOSED, "x-guidance": JSON_STYLE}}
REGEX = {"lark_grammar": "start: /[ab]+/"}
FORMS: list[tuple[dict[str, Any], dict[str, Any] | None]] = [
    ({"response_format": {"type": "text"}}, None),
    ({"structured_outputs": None}, None),
    ({"response_format": {"type": "json_object"}}, {"json_schema": {**ANY, "x-guidance": JSON_STYLE}}),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": SCHEMA}}},
        JSON,
    ),
    (
        {"structured_outputs": {"json": json.dumps(SCHEMA), "disable_any_whitespace": True}},
        {"json_schema": {**CLOSED, "x-guidance": {"whitespace_flexible": False, "lenient": False}}},
    ),
    (
        {"structured_outputs": {"json": SCHEMA, "whitespace_pattern": " "}},
        {"json_schema": {**CLOSED, "x-guidance": {**JSON_STYLE, "whitespace_pattern": " "}}},
    ),
    ({"structured_outputs": {"choice": ["yes", 'n"o', "ü"]}}, {"lark_grammar": 'start: "yes" | "n\\"o" | "ü"'}),
    ({"structured_outputs": {"regex": r"a/b\/c\d"}}, {"lark_grammar": r"start: /a\/b\/c\d/"}),
    (
        {"structured_outputs": {"grammar": "start: WORD\nWORD: /[a-z]+/"}},
        {"lark_grammar": "start: WORD\nWORD: /[a-z]+/"},
    ),
    ({"guided_json": SCHEMA}, JSON),
    ({"guided_json": json.dumps(SCHEMA), "guided_decoding_backend": "xgrammar"}, JSON),
    (
        {"guided_json": SCHEMA, "guided_whitespace_pattern": " "},
        {"json_schema": {**CLOSED, "x-guidance": {**JSON_STYLE, "whitespace_pattern": " "}}},
    ),
    ({"guided_regex": "[ab]+", "guided_json": None}, REGEX),
    ({"guided_choice": ["yes", "no"]}, {"lark_grammar": 'start: "yes" | "no"'}),
    ({"guided_grammar": 'root ::= "yes" | "no"'}, {"lark_grammar": 'start: "yes" | "no"'}),
    ({"structured_outputs": {"grammar": 'root ::= "a"'}}, {"lark_grammar": 'start: "a"'}),
    ({"regex": "[ab]+"}, REGEX),
    ({"ebnf": 'root ::= "yes" | "no"'}, {"lark_grammar": 'start: "yes" | "no"'}),
    ({"response_format": {"type": "json", "value": SCHEMA}}, JSON),
    ({"response_format": {"type": "json_object", "value": SCHEMA}}, JSON),
    ({"response_format": {"type": "json_schema", "value": {"name": "n", "schema": SCHEMA}}}, JSON),
    ({"response_format": {"type": "regex", "value": "[ab]+"}}, REGEX),
]


@pytest.mark.parametrize("path", ROUTES)
async def test_what_the_output_must_be_reaches_the_worker(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, path: str
) -> None:
    for fields, constraint in FORMS:
        fleet.seen.clear()
        answer = await http.post(path, json={**ROUTES[path], **fields})
        assert answer.status_code == 200, answer.text
        grammar = fleet.seen[0][1].grammar
        assert (json.loads(grammar) if grammar else None) == (constraint and {"grammars": [constraint]})


async def test_tgi_s_grammar_is_enforced_on_its_own_route(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    for parameters, constraint in (
        ({"grammar": {"type": "json", "value": SCHEMA}}, JSON),
        ({"grammar": {"type": "regex", "value": "[ab]+"}}, REGEX),
        ({"response_format": {"type": "json", "value": SCHEMA}}, JSON),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}, JSON),
    ):
        fleet.seen.clear()
        answer = await http.post("/generate", json={"inputs": "hi", "parameters": parameters})
        assert answer.status_code == 200, answer.text
        assert json.loads(fleet.seen[0][1].grammar) == {"grammars": [constraint]}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"guided_regex": "a", "regex": "b"}, "regex"),
    ({"guided_json": SCHEMA, "response_format": {"type": "json_object"}}, "guided_json"),
    ({"guided_regex": "a", "structured_outputs": {"choice": ["b"]}}, "guided_regex"),
    ({"guided_regex": ""}, "guided_regex"),
    ({"guided_regex": "("}, "guided_regex"),
    ({"ebnf": "root ::= x"}, "ebnf"),
    ({"response_format": {"type": "yaml", "value": "a"}}, "response_format"),
    ({"response_format": {"type": "text", "schema": SCHEMA}}, "response_format.schema"),
    ({"response_format": {"type": "json_object", "json_schema": {"schema": SCHEMA}}}, "response_format.json_schema"),
    ({"response_format": {"type": "json", "value": SCHEMA, "schema": SCHEMA}}, "response_format.value"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": MAX_MODEL_LEN + 1}, "truncate_prompt_tokens"),
    ({"truncation_side": "left"}, "truncation_side"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": "x" * 129}, "cache_salt"),
    ({"request_id": "a b"}, "request_id"),
    ({"request_id": "x" * 129}, "request_id"),
]


@pytest.mark.parametrize("path", ROUTES)
async def test_what_is_wrong_in_them_is_named(http: httpx2.AsyncClient, fleet: ScriptedFleet, path: str) -> None:
    for fields, param in BAD:
        answer = await http.post(path, json={**ROUTES[path], **fields})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), (fields, answer.text)
    assert fleet.seen == []


async def test_a_seed_beyond_64_bits_is_told_its_range(http: httpx2.AsyncClient) -> None:
    answer = await http.post("/v1/completions", json={**COMPLETION, "seed": 1 << 64})
    assert "from -9223372036854775808 to 9223372036854775807" in answer.json()["error"]["message"]


def ids_of(raw: bytes) -> list[int]:
    return memoryview(raw).cast("i").tolist()


async def test_prompts_are_cut_at_the_side_that_is_asked(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    ids = list(range(5, 25))
    for fields, left in (
        ({"truncate_prompt_tokens": 3}, ids[-3:]),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, ids[:3]),
        ({"truncate_prompt_tokens": 50}, ids),
    ):
        fleet.seen.clear()
        answer = await http.post("/v1/completions", json={"model": "base", "prompt": ids, **fields})
        assert answer.json()["usage"]["prompt_tokens"] == len(left)
        assert ids_of(fleet.seen[0][1].prompt) == left
    fleet.seen.clear()
    long = {"model": "base", "prompt": [5] * 2 * MAX_MODEL_LEN, "truncate_prompt_tokens": -1, "max_tokens": 7}
    assert (await http.post("/v1/completions", json=long)).status_code == 200
    assert len(ids_of(fleet.seen[0][1].prompt)) == MAX_MODEL_LEN - 7


async def test_a_conversation_is_cut_too(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    await http.post("/v1/chat/completions", json=CHAT)
    long = {**CHAT, "messages": [{"role": "user", "content": "hi " * 2 * MAX_MODEL_LEN}], "truncate_prompt_tokens": 3}
    assert (await http.post("/v1/chat/completions", json=long)).status_code == 200
    [whole, cut] = [ids_of(body.prompt) for _, body in fleet.seen]
    assert cut == whole[-3:]


async def test_an_echo_is_of_what_is_left(http: httpx2.AsyncClient, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the quick brown fox", add_special_tokens=False).ids
    body = {"model": "base", "prompt": ids, "truncate_prompt_tokens": 2, "echo": True, "max_tokens": 0}
    answer = await http.post("/v1/completions", json=body)
    assert answer.json()["choices"][0]["text"] == tokenizer.decode(ids[-2:])
    for fields, headers in (({"background": True, "max_tokens": 1}, {}), ({}, {"idempotency-key": "k"})):
        answer = await http.post("/v1/completions", json={**body, **fields}, headers=headers)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "echo")


@pytest.mark.parametrize("path", ROUTES)
async def test_a_salt_keeps_prefixes_apart(http: httpx2.AsyncClient, fleet: ScriptedFleet, path: str) -> None:
    for fields in ({}, {"cache_salt": "s"}, {"cache_salt": "t"}):
        await http.post(path, json={**ROUTES[path], **fields})
    assert [body.salt for _, body in fleet.seen] == ["", "\0s", "\0t"]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_has_the_id_of_its_request(http: httpx2.AsyncClient, path: str, stream: bool) -> None:
    prefix = "chatcmpl-" if "chat" in path else "cmpl-"
    for headers, fields, end in (
        ({}, {"request_id": "own"}, "own"),
        ({"x-request-id": "from-a-header"}, {"request_id": "own"}, "from-a-header"),
    ):
        answer = await http.post(path, json={**ROUTES[path], **fields, "stream": stream}, headers=headers)
        assert f'"id":"{prefix}{end}"' in answer.text


async def test_documents_and_effort_are_variables_of_the_template(
    http: httpx2.AsyncClient, fleet: ScriptedFleet
) -> None:
    for fields in ({"documents": [{"title": "t", "text": "x"}]}, {"reasoning_effort": "low"}):
        assert (await http.post("/v1/chat/completions", json={**CHAT, **fields})).status_code == 200


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_is_shown_if_it_is_wanted(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, path: str, stream: bool
) -> None:
    text = Script().text
    for included in (False, True):
        body = {**ROUTES[path], "stop": ["how"], "include_stop_str_in_output": included, "stream": stream}
        answer = await http.post(path, json={**body, "max_tokens": 100})
        shown = text[: text.index("how")] + ("how" if included else "")
        assert text_of(events_of(answer)) == shown
