"""Streams start and end with the fields and in the places that programs for OpenAI, vLLM, SGLang and TGI expect."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from helpers.openai_events import events_of
from helpers.scripted_fleet import Script, ScriptedFleet

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "add"}}
CALL = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'


def body_of(path: str, **fields: Any) -> dict[str, Any]:
    asked = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "hi"}
    return {"model": "base", "max_tokens": 60, **asked, **fields}


async def chunks_of(http: httpx2.AsyncClient, path: str, **fields: Any) -> list[dict[str, Any]]:
    return events_of(await http.post(path, json=body_of(path, stream=True, **fields)))


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_the_end_comes_with_the_last_token(
    subtests: pytest.Subtests, http: httpx2.AsyncClient, fleet: ScriptedFleet, path: str
) -> None:
    """`text += delta.content` works up to the last chunk, which has the logprobs and ids of the last token."""
    eos = fleet.tokenizer.token_to_id("<|im_end|>")
    dog = fleet.tokenizer.encode(Script().text).ids[4]
    for fields, finish, stop, matched in (
        ({}, "stop", None, eos),
        ({"max_tokens": 3}, "length", None, None),
        ({"stop": ["how"]}, "stop", "how", "how"),
        ({"stop_token_ids": [dog]}, "stop", dog, dog),
    ):
        with subtests.test(fields=fields):
            more = {"logprobs": True} if path == CHAT else {"logprobs": 0}
            chunks = await chunks_of(http, path, return_token_ids=True, **more, **fields)
            choices = [chunk["choices"][0] for chunk in chunks]
            assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + [finish]
            last = choices[-1]
            assert (last["stop_reason"], last["matched_stop"]) == (stop, matched)
            text = "".join(choice["delta"]["content"] if path == CHAT else choice["text"] for choice in choices)
            assert last["token_ids"]
            assert last["logprobs"] is not None
            whole = (await http.post(path, json=body_of(path, **fields))).json()
            end = whole["choices"][0]
            assert (end["finish_reason"], end["stop_reason"], end["matched_stop"]) == (finish, stop, matched)
            assert text == (end["message"]["content"] if path == CHAT else end["text"])
            prompt = whole if path == CHAT else end
            assert (end["token_ids"], prompt["prompt_token_ids"], prompt["prompt_logprobs"]) == (None, None, None)
            if path == CHAT:
                assert (end["message"]["reasoning"], end["message"]["reasoning_content"]) == (None, None)


async def test_a_forced_call_begins_without_content(qwen: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script(CALL)
    named = {"type": "function", "function": {"name": "add"}}
    for choice, content in (("required", None), (named, None), ("auto", ""), (None, "")):
        first, *others = await chunks_of(qwen, CHAT, tools=[TOOL], tool_choice=choice, max_tokens=200)
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": content, "refusal": None}
        assert not any("content" in chunk["choices"][0]["delta"] for chunk in others)
        assert others[-1]["choices"][0]["finish_reason"] == "tool_calls"
