"""`continue_final_message`: the answer continues the assistant's last message, and only the new text is returned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest
from helpers.scripted_fleet import Script, ScriptedFleet, gateway_client, make_model_folder
from openai import AsyncOpenAI

from protocol.queue.bus import Bus

CHAT = "/v1/chat/completions"
TEMPLATES = Path(__file__).parents[1] / "templates"
PREFIX = "The answer is "
MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": PREFIX}]
BODY: dict[str, Any] = {"model": "base", "messages": MESSAGES, "continue_final_message": True}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
NUMBERS = {
    "type": "json_schema",
    "json_schema": {"name": "n", "schema": {"type": "array", "items": {"type": "integer"}}},
}


def prompt_of(fleet: ScriptedFleet) -> str:
    """Return the prompt of the last request."""
    ids = memoryview(fleet.seen[-1][1].prompt).cast("i").tolist()
    return fleet.tokenizer.decode(ids, skip_special_tokens=False)


async def test_the_prompt_ends_with_the_message_and_new_text_comes_back(
    client: AsyncOpenAI, fleet: ScriptedFleet
) -> None:
    fleet.script = lambda submit, body: Script("42.")
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    whole = await client.chat.completions.create(model="base", messages=MESSAGES, extra_body=extra)
    assert prompt_of(fleet) == f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{PREFIX}"
    assert (whole.choices[0].message.content, whole.choices[0].message.role) == ("42.", "assistant")
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == fleet.seen[-1][0].num_prompt_tokens
    stream = await client.chat.completions.create(model="base", messages=MESSAGES, stream=True, extra_body=extra)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "42."


@pytest.mark.parametrize(("flags", "end"), [
    ({}, "<|im_end|>\n<|im_start|>assistant\n"),
    ({"add_generation_prompt": False}, "<|im_end|>\n"),
    ({"continue_final_message": True}, ""),
    ({"continue_final_message": False, "add_generation_prompt": True}, "<|im_end|>\n<|im_start|>assistant\n"),
])  # fmt: skip
async def test_an_answer_begins_unless_it_is_to_go_on(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, flags: dict[str, Any], end: str
) -> None:
    answer = await http.post(CHAT, json={"model": "base", "messages": MESSAGES, **flags})
    assert answer.status_code == 200, answer.text
    assert prompt_of(fleet).endswith(PREFIX + end)


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


async def test_what_cannot_go_on_is_refused(
    subtests: pytest.Subtests, http: httpx2.AsyncClient, fleet: ScriptedFleet
) -> None:
    for change, param in [
        ({"add_generation_prompt": True}, "continue_final_message"),
        ({"messages": MESSAGES[:1]}, "continue_final_message"),
        ({"messages": [MESSAGES[0], {"role": "assistant", "content": None}]}, "continue_final_message"),
        (
            {"messages": [MESSAGES[0], {"role": "assistant", "content": "a", "tool_calls": [CALL]}]},
            "continue_final_message",
        ),
        ({"continue_final_message": "yes"}, "continue_final_message"),
        ({"messages": []}, "messages"),
        ({"chat_template_kwargs": {"continue_final_message": False}}, "chat_template_kwargs.continue_final_message"),
        ({"chat_template_kwargs": {"add_generation_prompt": True}}, "chat_template_kwargs.add_generation_prompt"),
    ]:
        with subtests.test(change=change, param=param):
            answer = await http.post(CHAT, json={**BODY, **change})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
            assert not fleet.seen


async def test_a_grammar_holds_for_the_new_text(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script("[42]")
    answer = await http.post(CHAT, json={**BODY, "response_format": NUMBERS})
    assert answer.json()["choices"][0]["message"]["content"] == "[42]"
    assert json.loads(fleet.seen[-1][1].grammar)["grammars"][0]["json_schema"]["type"] == "array"


@pytest.mark.parametrize("template", ["qwen", "llama3"])
async def test_tools_and_reasoning_beside_a_text_that_goes_on(
    bus: Bus, fleet: ScriptedFleet, tmp_path: Path, template: str
) -> None:
    folder = make_model_folder(tmp_path / "model", (TEMPLATES / f"{template}.jinja").read_text())
    fleet.max_model_len = 1024
    await fleet.register()
    async with gateway_client(bus, folder) as http:
        if template == "llama3":
            answer = await http.post(CHAT, json={**BODY, "tools": [TOOL]})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "continue_final_message")
            assert "leave out tools" in answer.json()["error"]["message"]
            answer = await http.post(CHAT, json={**BODY, "tools": [TOOL], "tool_choice": "none"})
            assert answer.status_code == 200, answer.text
            return
        fleet.script = lambda submit, body: Script('42.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>')
        choice = (await http.post(CHAT, json={**BODY, "tools": [TOOL]})).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("42.", "tool_calls")
        assert prompt_of(fleet).endswith(PREFIX)
        for final, said, wanted in (
            ("<think>\nHm", " so.\n</think>\n\nYes", ("Yes", " so.\n")),
            ("", "<think>\nHm.\n</think>\n\nYes", ("Yes", "\nHm.\n")),
            ("Well", "<think> is a mark", ("<think> is a mark", None)),
        ):
            fleet.script = lambda submit, body, said=said: Script(said)
            messages = [MESSAGES[0], {"role": "assistant", "content": final}]
            message = (await http.post(CHAT, json={**BODY, "messages": messages})).json()["choices"][0]["message"]
            assert (message["content"], message.get("reasoning")) == wanted


@pytest.mark.parametrize("tools", [{}, {"tools": [TOOL]}])
async def test_a_continued_answer_is_the_same_when_it_is_read_again(
    qwen: httpx2.AsyncClient, fleet: ScriptedFleet, tools: dict[str, Any]
) -> None:
    fleet.script = lambda submit, body: Script("<think>no reasoning</think> 42.")
    body, key = {**BODY, **tools, "max_tokens": 100}, {"Idempotency-Key": "again"}
    first, again = [(await qwen.post(CHAT, json=body, headers=key)).json() for _ in range(2)]
    assert first["choices"][0]["message"]["content"] == "<think>no reasoning</think> 42."
    assert again == first
    job = (await qwen.post(CHAT, json={**body, "background": True})).json()
    ended = (await qwen.get(f"/v1/jobs/{job['id']}", headers={"Prefer": "wait=20"})).json()
    assert ended["result"]["choices"] == first["choices"]
