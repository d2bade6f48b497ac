"""SGLang's `stop_regex`: an answer ends at a match of any of the expressions, on both routes, streamed or not."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest
from helpers import openai_events
from helpers.openai_events import events_of
from helpers.scripted_fleet import Script, ScriptedFleet

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SAYS = "Paris.\nUser: and Rome? 2024-10-05"
TURN = r"\n(User|Human):"
DATE = r"\d{4}-\d\d"


def body_of(path: str, **fields: Any) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "hi"}
    return {"model": "base", "max_tokens": 100, **asked, **fields}


def text_of(choice: dict[str, Any]) -> str:
    return openai_events.text_of([{"choices": [choice]}])


async def choices_of(http: httpx2.AsyncClient, path: str, **fields: Any) -> list[dict[str, Any]]:
    return events_of(await http.post(path, json=body_of(path, **fields)))[0]["choices"]


async def streamed(http: httpx2.AsyncClient, path: str, **fields: Any) -> tuple[str, dict[str, Any]]:
    """Return the text of a streamed answer, and the choice of its last chunk."""
    chunks = events_of(await http.post(path, json=body_of(path, stream=True, **fields)))
    return openai_events.text_of(chunks), chunks[-1]["choices"][0]


CASES: list[tuple[dict[str, Any], str, str, str | None]] = [
    ({"stop_regex": TURN}, "Paris.", "stop", TURN),
    ({"stop_regex": [DATE, TURN]}, "Paris.", "stop", TURN),
    ({"stop_regex": [DATE, "(?i)user"]}, "Paris.\n", "stop", "(?i)user"),
    ({"stop_regex": [DATE]}, "Paris.\nUser: and Rome? ", "stop", DATE),
    ({"stop_regex": [DATE], "stop": ["Rome"]}, "Paris.\nUser: and ", "stop", "Rome"),
    ({"stop_regex": ["R.*e"], "stop": ["Rome"]}, "Paris.\nUser: and ", "stop", "Rome"),
    ({"stop_regex": ["d R.*m"], "stop": ["Rome"]}, "Paris.\nUser: an", "stop", "d R.*m"),
    ({"stop_regex": [r"[?!]\s*$"]}, "Paris.\nUser: and Rome", "stop", r"[?!]\s*$"),
    ({"stop_regex": [r"(?m)^User\b"]}, "Paris.\n", "stop", r"(?m)^User\b"),
    ({"stop_regex": ["no.{0,9}t", r"\nNobody"]}, SAYS, "stop", None),
    ({"stop_regex": [TURN], "include_stop_str_in_output": True}, "Paris.\nUser:", "stop", TURN),
    ({"stop_regex": [TURN], "min_tokens": 20}, SAYS, "stop", None),
    ({"stop_regex": ["a"], "max_tokens": 1}, "P", "length", None),
    ({"stop_regex": "", "max_tokens": 1}, "P", "length", None),
    ({"stop_regex": None, "max_tokens": 1}, "P", "length", None),
]  # fmt: skip


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_an_answer_ends_before_a_match(
    subtests: pytest.Subtests, http: httpx2.AsyncClient, fleet: ScriptedFleet, path: str
) -> None:
    fleet.script = lambda submit, body: Script(text=SAYS, eos=False)
    for fields, text, finish, matched in CASES:
        with subtests.test(fields=fields):
            [choice] = await choices_of(http, path, **fields)
            assert (text_of(choice), choice["finish_reason"]) == (text, finish)
            assert (choice["stop_reason"], choice["matched_stop"]) == (matched, matched)
            shown, last = await streamed(http, path, **fields)
            assert (shown, last["finish_reason"], last["matched_stop"]) == (text, finish, matched)


async def test_workers_are_told_and_only_those_that_know(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script(text=SAYS)
    for choice in await choices_of(http, COMPLETIONS, stop_regex=TURN, n=3, prompt=["hi", "there"]):
        assert text_of(choice) == "Paris."
    for submit, body in fleet.seen:
        assert (submit.needs, body.sampling.stop_regex) == (["stop_regex"], [TURN])
    fleet.seen.clear()
    await choices_of(http, COMPLETIONS, stop_regex=[])
    assert fleet.seen[0][0].needs == []


async def test_logprobs_and_offsets_end_with_the_token_that_ends_the_text(
    http: httpx2.AsyncClient, fleet: ScriptedFleet
) -> None:
    """The same as with the matched text as stop string."""
    fleet.script = lambda submit, body: Script(text=SAYS)
    for fields in ({}, {"echo": True}, {"include_stop_str_in_output": True}):
        asked: dict[str, Any] = {"logprobs": 1, "return_token_ids": True, **fields}
        [by_string] = await choices_of(http, COMPLETIONS, stop=["\nUser:"], **asked)
        [by_regex] = await choices_of(http, COMPLETIONS, stop_regex=[TURN], **asked)
        named = {"stop_reason": TURN, "matched_stop": TURN}
        assert {**by_string, **named} == by_regex
        assert by_regex["logprobs"]["tokens"][-1] == ":"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_job_and_a_key_s_second_answer_end_alike(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, path: str
) -> None:
    fleet.script = lambda submit, body: Script(text=SAYS)
    key = {"idempotency-key": path}
    asked = body_of(path, stop_regex=[TURN])
    answers = [(await http.post(path, json=asked, headers=key)).json() for _ in range(2)]
    assert text_of(answers[0]["choices"][0]) == "Paris."
    assert answers[0] == answers[1]
    job = (await http.post(path, json={**asked, "background": True})).json()
    ended = (await http.get(f"/v1/jobs/{job['id']}", headers={"prefer": "wait=20"})).json()
    [choice] = ended["result"]["choices"]
    assert (text_of(choice), choice["matched_stop"]) == ("Paris.", TURN)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_what_is_not_served_is_told_before_anything_is_queued(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, path: str
) -> None:
    for given, told in (
        ("(", "without its )"), (["ok", r"(?=end)"], "not supported"), (["a*"], "the empty text"),
        ("^$", "the empty text"), (r"^\ba", "right after another"),
        (["ab"] * 17, "17 expressions; the limit is 16"), (["a" * 1025], "1025 characters; the limit is 1024"),
        (["a{300}", "b{300}"], "600 characters and alternatives"), ([5], "string"), ({"a": "b"}, "stop_regex"),
        (["a" * 500] * 16, "8000 characters; the limit is 1024"),
    ):  # fmt: skip
        answer = await http.post(path, json=body_of(path, stop_regex=given))
        error = answer.json()["error"]
        assert (answer.status_code, error["type"]) == (400, "invalid_request_error"), answer.text
        assert error["param"].split(".")[0] == "stop_regex"
        assert told in error["message"]
    assert fleet.seen == []


async def test_many_at_once_each_end_by_their_own(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script(text=SAYS, chunk=3)
    marks = ["P", "a", "r", "U", "R", "2", "\\?", "-"]
    found = await asyncio.gather(*(streamed(http, COMPLETIONS, stop_regex=[f"[{mark}].?"]) for mark in marks))
    for mark, (text, last) in zip(marks, found, strict=True):
        assert text == SAYS[: SAYS.index(mark[-1])]
        assert last["stop_reason"] == f"[{mark}].?"
