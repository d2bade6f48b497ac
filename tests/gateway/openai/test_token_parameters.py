"""vLLM's parameters about single tokens: which may be chosen, and what answers report about them."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest
from helpers.openai_events import events_of
from helpers.scripted_fleet import Script, ScriptedFleet
from tokenizers import Tokenizer

from gateway.calls.tokenize import MAX_BAD_WORD_TOKENS
from gateway.openai.openai_bodies import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORD_CHARACTERS,
    MAX_BAD_WORDS,
    MAX_LOGPROB_TOKEN_IDS,
)

CHAT_PATH, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CHAT: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 60}
COMPLETION: dict[str, Any] = {"model": "base", "prompt": "the dog", "max_tokens": 60}
ROUTES = {CHAT_PATH: CHAT, COMPLETIONS: COMPLETION}
SAYS = "the lazy dög"


def logprobs_of(path: str) -> dict[str, Any]:
    return {"logprobs": True, "top_logprobs": 2} if path == CHAT_PATH else {"logprobs": 2}


def says(text: str) -> Any:
    return lambda submit, body: Script(text=text, chunk=2)


def prompt_ids(fleet: ScriptedFleet, which: int = -1) -> list[int]:
    return memoryview(fleet.seen[which][1].prompt).cast("i").tolist()


async def answer_of(http: httpx2.AsyncClient, path: str, **fields: Any) -> Any:
    return events_of(await http.post(path, json={**ROUTES[path], **fields}))[0]


async def chunks_of(http: httpx2.AsyncClient, path: str, **fields: Any) -> list[Any]:
    answer = await http.post(path, json={**ROUTES[path], **fields, "stream": True})
    assert answer.text.endswith("data: [DONE]\n\n")
    return events_of(answer)


# ---------------------------------------------------------------- which tokens may be chosen


@pytest.mark.parametrize("path", ROUTES)
async def test_allowed_tokens_and_bad_words_reach_the_worker(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, tokenizer: Tokenizer, path: str
) -> None:
    await answer_of(http, path, allowed_token_ids=[7, 9, 7], bad_words=["dog", " fox", "the lazy"], n=2)
    [(_, first), (_, second)] = fleet.seen
    assert first.sampling.allowed_token_ids == [7, 9, 7]
    expected: list[list[int]] = []
    for word in ("dog", "fox", "the lazy"):
        bare, spaced = (tokenizer.encode(text, add_special_tokens=False).ids for text in (word, f" {word}"))
        assert bare[0] != spaced[0], "the test needs words that begin otherwise after a space"
        expected += [bare, spaced] if len(bare) == len(spaced) else [bare]
    assert len(expected) > 3
    assert first.sampling.bad_words == second.sampling.bad_words == expected
    await answer_of(http, path, bad_words=[])
    assert fleet.seen[-1][1].sampling.bad_words == []


BAD: list[tuple[dict[str, Any], str]] = [
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"allowed_token_ids": [5, 300]}, "allowed_token_ids"),
    ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
    ({"allowed_token_ids": [5] * (MAX_ALLOWED_TOKEN_IDS + 1)}, "allowed_token_ids"),
    ({"allowed_token_ids": ["a"]}, "allowed_token_ids"),
    ({"bad_words": [""]}, "bad_words"),
    ({"bad_words": [" "]}, "bad_words"),
    ({"bad_words": ["a"] * (MAX_BAD_WORDS + 1)}, "bad_words"),
    ({"bad_words": ["a" * (MAX_BAD_WORD_CHARACTERS + 1)]}, "bad_words"),
    ({"bad_words": ["😀" * 9] * (MAX_BAD_WORD_TOKENS // 9 // 4 + 1)}, "bad_words"),
    ({"bad_words": [5]}, "bad_words"),
    ({"prompt_logprobs": -2}, "prompt_logprobs"),
    ({"prompt_logprobs": -1, "background": True}, "prompt_logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"logprob_token_ids": [5]}, "logprob_token_ids"),
    ({"logprob_token_ids": [], "logprobs": 1}, "logprob_token_ids"),
    ({"logprob_token_ids": [300], "logprobs": 1}, "logprob_token_ids"),
    ({"logprob_token_ids": [5] * (MAX_LOGPROB_TOKEN_IDS + 1), "logprobs": 1}, "logprob_token_ids"),
    ({"return_tokens_as_token_ids": True}, "return_tokens_as_token_ids"),
    ({"return_token_ids": True, "background": True}, "return_token_ids"),
]


@pytest.mark.parametrize("path", ROUTES)
async def test_what_is_wrong_in_them_is_named(http: httpx2.AsyncClient, fleet: ScriptedFleet, path: str) -> None:
    for fields, param in BAD:
        if fields.get("logprobs"):
            fields = {**fields, "logprobs": path == CHAT_PATH or 1}
        answer = await http.post(path, json={**ROUTES[path], **fields})
        found = answer.json()["error"]
        assert (answer.status_code, found["param"]) == (400, param), (fields, found)
        assert param in found["message"]
    keyed = await http.post(path, json={**ROUTES[path], "return_token_ids": True}, headers={"idempotency-key": "k"})
    assert (keyed.status_code, keyed.json()["error"]["param"]) == (400, "return_token_ids")
    assert fleet.seen == []


# ---------------------------------------------------------------- logprobs of prompts


def ranked(tokenizer: Tokenizer, id_: int, num: int) -> dict[str, Any]:
    """Return the scripted worker's logprobs of a prompt token."""
    top = {id_ + i: (-1.0 * (i + 1), i + 1) for i in range(num)}
    return {
        str(own): {"logprob": logprob, "rank": rank, "decoded_token": tokenizer.decode([own])}
        for own, (logprob, rank) in ({id_: (-0.5, 7)} | top).items()
    }


@pytest.mark.parametrize("num", [0, 2])
@pytest.mark.parametrize("background", [False, True])
async def test_completions_have_the_logprobs_of_their_prompts(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, tokenizer: Tokenizer, num: int, background: bool
) -> None:
    prompts = ["the dog", "fox"]
    fields = {"prompt": prompts, "prompt_logprobs": num, "n": 2, "background": background}
    answer = (await http.post(COMPLETIONS, json={**COMPLETION, **fields})).json()
    if background:
        answer = (await http.get(f"/v1/jobs/{answer['id']}", headers={"prefer": "wait=20"})).json()["result"]
    for choice, prompt in zip(answer["choices"], [prompt for prompt in prompts for _ in range(2)], strict=True):
        ids = tokenizer.encode(prompt).ids
        assert choice["prompt_logprobs"] == [None, *(ranked(tokenizer, id_, num) for id_ in ids[1:])]
        assert choice["logprobs"] is None
    assert {body.sampling.num_logprobs for _, body in fleet.seen} == {None}


async def test_a_chat_has_the_logprobs_of_its_prompt_once(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, tokenizer: Tokenizer
) -> None:
    answer = await answer_of(http, CHAT_PATH, prompt_logprobs=1, n=2)
    ids = prompt_ids(fleet)
    expected = [None, *(ranked(tokenizer, id_, 1) for id_ in ids[1:])]
    for entry in [*answer["prompt_logprobs"][1:], *expected[1:]]:  # special tokens have their own text
        [value.pop("decoded_token") for value in entry.values()]
    assert answer["prompt_logprobs"] == expected
    assert all("prompt_logprobs" not in choice for choice in answer["choices"])
    await fleet.add_adapter("alpha", "d1")
    several = await answer_of(http, CHAT_PATH, prompt_logprobs=0, return_token_ids=True, model=["base", "alpha"])
    assert "prompt_token_ids" not in several
    assert all(len(choice["prompt_logprobs"]) == len(ids) for choice in several["choices"])
    assert all(choice["prompt_token_ids"] == ids for choice in several["choices"])


async def test_echo_and_prompt_logprobs_each_show_their_own_number(
    http: httpx2.AsyncClient, tokenizer: Tokenizer
) -> None:
    for echoed, ranked_ in ((0, 3), (3, 0), (2, 2)):
        answer = await answer_of(http, COMPLETIONS, echo=True, logprobs=echoed, prompt_logprobs=ranked_, max_tokens=0)
        choice = answer["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("the dog", "length")
        num = len(tokenizer.encode("the dog").ids)
        assert [len(top or ()) for top in choice["logprobs"]["top_logprobs"]] == [0] + [max(echoed, 1)] * (num - 1)
        assert [len(entry or ()) for entry in choice["prompt_logprobs"]] == [0] + [max(ranked_, 1)] * (num - 1)
    alone = (await answer_of(http, COMPLETIONS, prompt_logprobs=0, max_tokens=0))["choices"][0]
    assert (alone["text"], len(alone["prompt_logprobs"]), alone["logprobs"]) == ("", num, None)


# ---------------------------------------------------------------- logprobs of listed tokens, names of tokens


@pytest.mark.parametrize("stream", [False, True])
async def test_listed_tokens_take_the_place_of_the_likeliest(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, tokenizer: Tokenizer, stream: bool
) -> None:
    fleet.script = says(SAYS)
    ids = [*tokenizer.encode(SAYS).ids, 1]
    listed = [40, ids[0], 60]
    for path in ROUTES:
        wish = {**logprobs_of(path), "logprob_token_ids": listed, "return_tokens_as_token_ids": True}
        if stream:
            answers = await chunks_of(http, path, **wish)
        else:
            answers = [await answer_of(http, path, **wish)]
        found = [choice["logprobs"] for answer in answers for choice in answer["choices"] if choice["logprobs"]]
        values = {40: -1.0, ids[0]: -2.0, 60: -3.0}
        if path == COMPLETIONS:
            assert [name for one in found for name in one["tokens"]] == [f"token_id:{id_}" for id_ in ids]
            tops = [top for one in found for top in one["top_logprobs"]]
            expected = [{f"token_id:{k}": v for k, v in ({**values} | {id_: -0.5}).items()} for id_ in ids]
            assert tops == expected
        else:
            entries = [entry for one in found for entry in one["content"]]
            assert [entry["token"] for entry in entries] == [f"token_id:{id_}" for id_ in ids]
            assert b"".join(bytes(entry["bytes"]) for entry in entries) == f"{SAYS}<|im_end|>".encode()
            for id_, entry in zip(ids, entries, strict=True):
                shown = [(top["token"], top["logprob"]) for top in entry["top_logprobs"]]
                rest = [(f"token_id:{k}", v) for k, v in values.items() if k != id_]
                assert shown == [(f"token_id:{id_}", -0.5), *rest]
        assert fleet.seen[-1][1].sampling.num_logprobs == 3


# ---------------------------------------------------------------- ids


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("says_", [SAYS, ""])
async def test_answers_have_the_ids_of_their_tokens(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, tokenizer: Tokenizer, path: str, says_: str
) -> None:
    fleet.script = says(says_)
    ids = [*tokenizer.encode(says_).ids, 1]
    for fields in ({}, logprobs_of(path), {"stop": "dö", "include_stop_str_in_output": True}, {"max_tokens": 1}):
        whole = await answer_of(http, path, return_token_ids=True, n=2, **fields)
        prompt = prompt_ids(fleet)
        for choice in whole["choices"]:
            assert choice["token_ids"] == ids[: len(choice["token_ids"])]
            assert (whole if path == CHAT_PATH else choice)["prompt_token_ids"] == prompt
        num = sum(len(choice["token_ids"]) for choice in whole["choices"])
        assert num == whole["usage"]["completion_tokens"]
        events = await chunks_of(http, path, return_token_ids=True, n=2, **fields)
        for index in range(2):
            own = [event for event in events if event["choices"][0]["index"] == index]
            parts = [event["choices"][0] for event in own]
            place = own if path == CHAT_PATH else parts
            assert [part["prompt_token_ids"] for part in place if "prompt_token_ids" in part] == [prompt]
            streamed = [id_ for part in parts for id_ in part.get("token_ids", [])]
            assert streamed == whole["choices"][index]["token_ids"]
    plain = await answer_of(http, path)
    assert {plain["choices"][0]["token_ids"], {**plain, **plain["choices"][0]}["prompt_token_ids"]} == {None}


async def test_an_echo_is_shown_beside_its_ids(http: httpx2.AsyncClient, tokenizer: Tokenizer) -> None:
    choice = (await answer_of(http, COMPLETIONS, echo=True, return_token_ids=True, max_tokens=0))["choices"][0]
    assert (choice["text"], choice["token_ids"]) == ("the dog", [])
    assert choice["prompt_token_ids"] == tokenizer.encode("the dog").ids


# ---------------------------------------------------------------- echo in a chat

BEGUN = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "So: "}]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("messages", "fields", "echo"),
    [
        (BEGUN, {"continue_final_message": True}, "So: "),
        (BEGUN, {}, "So: "),
        (BEGUN[:1], {}, ""),
        (BEGUN[:1], {"add_generation_prompt": False}, "hi"),
        ([*BEGUN[:1], {"role": "assistant", "content": [{"type": "text", "text": "ä"}]}], {"n": 2}, "ä"),
        ([*BEGUN[:1], {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}], "content": None}], {}, ""),
    ],
)
async def test_a_chat_echoes_a_last_message_of_its_own_role(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, messages: Any, fields: dict[str, Any], echo: str, stream: bool
) -> None:
    fleet.script = says(SAYS)
    for logprobs in ({}, {"logprobs": True}):
        wish = {"messages": messages, "echo": True, **fields, **logprobs}
        if not stream:
            texts = [choice["message"]["content"] for choice in (await answer_of(http, CHAT_PATH, **wish))["choices"]]
        else:
            events = await chunks_of(http, CHAT_PATH, **wish)
            texts = [
                "".join(e["choices"][0]["delta"].get("content") or "" for e in events if e["choices"][0]["index"] == i)
                for i in range(fields.get("n", 1))
            ]
        assert texts == [echo + SAYS] * fields.get("n", 1)


async def test_a_job_and_a_repeated_call_echo_too(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fleet.script = says(SAYS)
    body = {**CHAT, "messages": BEGUN, "echo": True}
    job = (await http.post(CHAT_PATH, json={**body, "background": True})).json()
    result = (await http.get(f"/v1/jobs/{job['id']}", headers={"prefer": "wait=20"})).json()["result"]
    assert result["choices"][0]["message"]["content"] == f"So: {SAYS}"
    for _ in range(2):
        answer = await http.post(CHAT_PATH, json=body, headers={"idempotency-key": "again"})
        assert answer.json()["choices"][0]["message"]["content"] == f"So: {SAYS}"
    assert len(fleet.seen) == 2


# ---------------------------------------------------------------- the internal key in schemas


@pytest.mark.parametrize("path", ROUTES)
async def test_a_schema_may_not_say_how_the_grammar_is_made(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, path: str
) -> None:
    schema = {"type": "object", "x-guidance": {"whitespace_flexible": False}}
    for fields, place in (
        ({"structured_outputs": {"json": schema}}, "structured_outputs.json"),
        ({"guided_json": json.dumps(schema)}, "guided_json"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}},
         "response_format.json_schema.schema"),
    ):  # fmt: skip
        answer = await http.post(path, json={**ROUTES[path], **fields})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, f"{place}.x-guidance")
        assert "disable_any_whitespace" in answer.json()["error"]["message"]
    assert fleet.seen == []
