"""`/v1/messages`: answers and streams match the types of the official client and each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2
import orjson
import pytest
from helpers import examples
from helpers.anthropic_events import Event, built, events_of, held_to
from helpers.scripted_fleet import (
    MAX_MODEL_LEN,
    Script,
    ScriptedFleet,
    gateway_client,
    make_model_folder,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gateway.anthropic.anthropic_write import MessageHead, MessagesWriter
from gateway.calls.choices import Piece
from gateway.calls.writers import CallUsage
from gateway.text.answer_form import AnswerForm
from gateway.tools.styles import HERMES
from protocol.queue.bus import Bus
from protocol.wire import messages as m

TEXT = Script().text
PATH = "/v1/messages"
BODY: dict[str, Any] = {"model": "base", "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}]}
TOOL = {
    "name": "add",
    "description": "adds",
    "input_schema": {"type": "object", "properties": {"p": {"type": "string"}}},
}
CALL = '<tool_call>\n{"name": "add", "arguments": {"p": "ö"}}\n</tool_call>'


async def streamed(http: httpx2.AsyncClient, body: dict[str, Any]) -> list[Event]:
    answer = await http.post(PATH, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    return events_of(answer.content)


async def whole(http: httpx2.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    answer = await http.post(PATH, json=body)
    assert answer.status_code == 200, answer.text
    return held_to("message", answer.json())


async def both(http: httpx2.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    """Return the whole answer, after a check that the streamed one is equal."""
    one, other = await whole(http, body), built(await streamed(http, body))
    ids = {block.pop("id") for message in (one, other) for block in message["content"] if block["type"] == "tool_use"}
    assert all(id_.startswith("toolu_") for id_ in ids)
    assert one.pop("id") != other.pop("id")
    assert one == other
    return one


# ---------------------------------------------------------------- answers


async def test_an_answer_and_its_stream_are_the_same(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    message = await both(http, BODY)
    num = len(fleet.seen[0][1].prompt) // 4
    assert message == {
        "type": "message", "role": "assistant", "model": "base", "content": [{"type": "text", "text": TEXT}],
        "stop_reason": "end_turn", "stop_sequence": None,
        "usage": {
            "input_tokens": num - 3, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 3,
            "output_tokens": len(fleet.tokenizer.encode(TEXT).ids) + 1,
        },
    }  # fmt: skip


async def test_an_empty_answer_has_no_block(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script("")
    message = await both(http, BODY)
    assert (message["content"], message["stop_reason"]) == ([], "end_turn")
    following = [*BODY["messages"], {"role": "assistant", "content": []}, {"role": "user", "content": "go on"}]
    await whole(http, {**BODY, "messages": following})


async def test_sampling_is_what_the_body_says(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    await whole(http, BODY)
    given = {"temperature": 0.5, "top_p": 0.25, "top_k": 7, "stop_sequences": ["x", ""], "max_tokens": 9}
    await whole(http, {**BODY, **given, "metadata": {"user_id": "u"}, "service_tier": "auto"})
    (submit, plain), (second, sampled) = fleet.seen
    assert plain.sampling == m.Sampling(temperature=1.0, seed=plain.sampling.seed)
    seed = sampled.sampling.seed
    assert sampled.sampling == m.Sampling(temperature=0.5, top_p=0.25, top_k=7, seed=seed)
    assert seed != plain.sampling.seed
    assert (submit.max_new_tokens, second.max_new_tokens, sampled.stop) == (100, 9, ["x"])


async def test_why_an_answer_ends(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    message = await both(http, {**BODY, "stop_sequences": ["zzz", " how", "how are"]})
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", " how")
    assert message["content"][0]["text"] == TEXT.partition(" how")[0]
    message = await both(http, {**BODY, "max_tokens": 4})
    assert (message["stop_reason"], message["stop_sequence"], message["usage"]["output_tokens"]) == (
        "max_tokens", None, 4,
    )  # fmt: skip
    fleet.script = lambda submit, body: Script("word " * 400)
    message = await both(http, {**BODY, "max_tokens": 100_000})
    assert message["stop_reason"] == "model_context_window_exceeded"
    assert message["usage"]["output_tokens"] == MAX_MODEL_LEN - len(fleet.seen[0][1].prompt) // 4


async def test_no_token_warms_the_cache_and_answers_with_nothing(
    http: httpx2.AsyncClient, fleet: ScriptedFleet
) -> None:
    message = await both(http, {**BODY, "max_tokens": 0})
    assert (message["content"], message["stop_reason"], message["usage"]["output_tokens"]) == ([], "max_tokens", 0)
    assert len(fleet.seen) == 2


async def test_an_adapter_answers_under_its_name(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    await fleet.add_adapter("fox", "ab" * 32)
    assert (await both(http, {**BODY, "model": "fox"}))["model"] == "fox"
    assert {submit.digest for submit, _ in fleet.seen} == {"ab" * 32}


# ---------------------------------------------------------------- prompts


async def test_the_prompt_is_what_openai_s_route_makes_of_it(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    for system in ("be brief", [{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}]):
        await whole(http, {**BODY, "system": system})
    messages = [{"role": "system", "content": "be brief"}, *BODY["messages"]]
    await http.post("/v1/chat/completions", json={"model": "base", "messages": messages})
    prompts = [body.prompt for _, body in fleet.seen]
    assert prompts == [prompts[0]] * 3


async def test_messages_of_one_role_are_one_turn(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    parts = [{"type": "text", "text": "two"}, {"type": "text", "text": "three"}]
    messages = [{"role": "user", "content": "one"}, {"role": "user", "content": parts}]
    await whole(http, {**BODY, "messages": messages})
    assert fleet.prompt() == "<|im_start|>user\none\ntwo\nthree<|im_end|>\n<|im_start|>assistant\n"


async def test_a_last_message_of_the_assistant_goes_on(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    await both(http, {**BODY, "messages": [*BODY["messages"], {"role": "assistant", "content": "Well,"}]})
    assert fleet.prompt().endswith("<|im_start|>assistant\nWell,")
    await whole(http, {**BODY, "messages": [*BODY["messages"], {"role": "assistant", "content": ""}]})
    assert fleet.prompt().endswith("<|im_start|>assistant\n")


async def test_calls_and_their_results_reach_the_template(qwen: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    anthropic = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": "x"},
            {"type": "text", "text": "Let me see."},
            {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"p": "ö"}, "caller": {"type": "direct"}},
            {"type": "tool_use", "id": "toolu_2", "name": "add", "input": {}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": "3"},
            {"type": "tool_result", "tool_use_id": "toolu_2", "is_error": True,
             "content": [{"type": "text", "text": "no p"}]},
            {"type": "text", "text": "And?"},
        ]},
    ]  # fmt: skip
    calls = [
        {"id": f"toolu_{i}", "type": "function", "function": {"name": "add", "arguments": json.dumps(given)}}
        for i, given in ((1, {"p": "ö"}), (2, {}))
    ]
    openai = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": "Let me see.", "reasoning_content": "Hm.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "toolu_1", "content": "3"},
        {"role": "tool", "tool_call_id": "toolu_2", "content": "Error: no p"},
        {"role": "user", "content": "And?"},
    ]
    await whole(qwen, {**BODY, "messages": anthropic, "tools": [TOOL]})
    function = {"name": "add", "parameters": TOOL["input_schema"], "description": "adds"}
    body = {"model": "base", "messages": openai, "tools": [{"type": "function", "function": function}]}
    assert (await qwen.post("/v1/chat/completions", json=body)).status_code == 200
    assert fleet.prompt(0) == fleet.prompt(1)
    assert "Error: no p" in fleet.prompt()


async def test_count_tokens_is_what_an_answer_counts(qwen: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    body = {**BODY, "system": "be brief", "tools": [TOOL], "thinking": {"type": "disabled"}}
    asked = {key: value for key, value in body.items() if key != "max_tokens"}
    counted = held_to("count", (await qwen.post(f"{PATH}/count_tokens", json=asked)).json())
    usage = (await whole(qwen, body))["usage"]
    assert counted == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}
    assert len(fleet.seen) == 1
    long = {**asked, "messages": [{"role": "user", "content": "the quick " * 1000}]}  # longer than the context
    assert (await qwen.post(f"{PATH}/count_tokens", json=long)).json()["input_tokens"] > fleet.max_model_len


# ---------------------------------------------------------------- tools and reasoning


async def test_calls_are_blocks_whose_input_streams(qwen: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script(f"Let me see.\n{CALL}\n{CALL}", eos=True)
    message = await both(qwen, {**BODY, "tools": [TOOL], "max_tokens": 300})
    call = {"type": "tool_use", "name": "add", "input": {"p": "ö"}}
    assert message["content"] == [{"type": "text", "text": "Let me see."}, call, call]
    assert message["stop_reason"] == "tool_use"
    assert {body.grammar != "" for _, body in fleet.seen} == {True}


async def test_a_call_that_is_cut_off_has_what_came_of_it(qwen: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script('<tool_call>\n{"name": "add", "arguments": {"p": "a", "q": [1, "b')
    message = await whole(qwen, {**BODY, "tools": [TOOL], "max_tokens": len(fleet.tokenizer.encode(CALL).ids)})
    assert message["content"][0]["input"] == {"p": "a", "q": [1]}


@pytest.mark.parametrize(
    ("choice", "num", "required"),
    [({"type": "auto"}, 2, False), ({"type": "any"}, 2, True), ({"type": "tool", "name": "sub"}, 1, True),
     ({"type": "any", "disable_parallel_tool_use": True}, 2, True), ({"type": "none"}, 0, False)],
)  # fmt: skip
async def test_tool_choices_become_grammars(
    qwen: httpx2.AsyncClient, fleet: ScriptedFleet, choice: dict[str, Any], num: int, required: bool
) -> None:
    tools = [TOOL, {**TOOL, "name": "sub", "type": "custom", "strict": False, "cache_control": None}]
    await whole(qwen, {**BODY, "tools": tools, "tool_choice": choice})
    grammar = fleet.seen[0][1].grammar
    if not num:
        assert grammar == ""
        assert "<tools>" not in fleet.prompt()
        return
    lark = json.dumps(json.loads(grammar)["grammars"])
    assert sum(f'name\\\\\\": \\\\\\"{name}' in lark for name in ("add", "sub")) == num
    assert ("start: calls" in lark) == required
    parallel = choice["type"] != "tool" and not choice.get("disable_parallel_tool_use")
    assert (" body)*" in lark) == parallel


async def test_reasoning_is_a_block_with_a_signature(qwen: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script("<think>\nHm. Ö\n</think>\n\nWell.")
    thinking = {"type": "enabled", "budget_tokens": 1024}
    message = await both(qwen, {**BODY, "max_tokens": 2000, "thinking": thinking})
    first, second = message["content"]
    assert (first["type"], first["thinking"], second) == ("thinking", "Hm. Ö\n", {"type": "text", "text": "Well."})
    assert len(first["signature"]) > 40
    left_out = await both(qwen, {**BODY, "max_tokens": 2000, "thinking": {**thinking, "display": "omitted"}})
    assert left_out["content"] == [{**first, "thinking": ""}, second]
    fleet.script = lambda submit, body: Script("<think>\n\n</think>\n\nWell.")
    assert (await both(qwen, BODY))["content"] == [second]


async def test_templates_are_told_whether_to_reason(bus: Bus, fleet: ScriptedFleet, tmp_path: Path) -> None:
    names = ("enable_thinking", "thinking", "thinking_budget", "reasoning_effort", "own")
    shown = " ".join(f"{{{{ {name} is defined and {name} }}}}" for name in names)
    folder = make_model_folder(tmp_path / "model", f"<think></think>{shown}{{{{ messages[0].content }}}}")
    async with gateway_client(bus, folder) as http:
        for given, told in (
            ({}, "False False False False False"),
            ({"thinking": {"type": "disabled"}}, "False False False False False"),
            ({"thinking": {"type": "adaptive"}}, "True True False False False"),
            ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "True True 1024 False False"),
            ({"output_config": {"effort": "xhigh"}}, "False False False xhigh False"),
            ({"chat_template_kwargs": {"own": 5, "thinking": 3}}, "False 3 False False 5"),
        ):
            await whole(http, {**BODY, "max_tokens": 2000, **given})
            assert fleet.prompt() == f"<think></think>{told}hi"


async def test_a_budget_of_thinking_is_enforced(bus: Bus, fleet: ScriptedFleet, tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}<think>\n{# </think> #}")
    fleet.max_model_len = 1024
    await fleet.register()
    async with gateway_client(bus, folder) as http:
        await whole(http, {**BODY, "max_tokens": 2000, "thinking": {"type": "enabled", "budget_tokens": 1024}})
        await whole(http, {**BODY, "thinking": {"type": "adaptive"}})
        # A budget shared by all answers between tool calls may exceed a single answer, which its own limit bounds.
        await whole(http, {**BODY, "thinking": {"type": "enabled", "budget_tokens": 32_000}, "tools": [TOOL]})
    first, second, third = (body.grammar for _, body in fleet.seen)
    assert "words[max_tokens=1024]: THOUGHT" in json.loads(first)["grammars"][0]["lark_grammar"]
    assert second == ""
    assert "words" not in third


async def test_a_format_is_enforced(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script('{"a": 1}')
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form = {"type": "json_schema", "schema": schema}
    for way in ({"output_config": {"format": form}}, {"output_format": form}):
        await both(http, {**BODY, **way})
        grammar = json.loads(fleet.seen[-1][1].grammar)["grammars"][0]["json_schema"]
        assert grammar["required"] == ["a"]


# ---------------------------------------------------------------- failing and waiting streams


async def test_a_stream_that_waits_gets_pings(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    fleet.script = lambda submit, body: Script(hold_after=0)
    async with (
        gateway_client(bus, model_folder, keepalive_s=0.05) as http,
        http.stream("POST", PATH, json={**BODY, "stream": True}) as answer,
    ):
        raw = b""
        async for part in answer.aiter_raw():
            raw += part
            if raw.count(b"event: ping") == 3:
                fleet.go.set()
        events = events_of(raw)
        assert [event["type"] for event in events[:3]] == ["ping"] * 3
        assert built(events)["content"] == [{"type": "text", "text": TEXT}]


# ---------------------------------------------------------------- property

FORM = AnswerForm(("<think>", "</think>"), False, HERMES, {}, {})
PIECES = ["<think>", "</think>", "<tool_call>\n", "\n</tool_call>", "\n", " ", "Hm.", "ö😀",
          '{"name": "add", "arguments": ', '{"p": "}\\"{"}', "{}", '{"q": [1, {}]}', "}"]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ('{"p": ' + "[" * 300 + "]" * 300 + "}", None),
        ('{"p": 1' + "0" * 5000 + "}", "{}"),
        ('{"p": ' + "[" * 300, "{}"),
        ('{"p": 1, "q": "a', '{"p": 1}'),
    ],
)
def test_any_arguments_of_a_call_can_be_answered(arguments: str, wanted: str | None) -> None:
    writer = MessagesWriter(MessageHead("msg_1", "base", 5), FORM, "r", max_tokens=100, shows_thinking=True)
    text = '<tool_call>\n{"name": "add", "arguments": ' + arguments
    made = orjson.dumps(writer.whole([Piece(0, text, finish="length")], CallUsage(5, 7, 3)))
    assert b'"input":' + (arguments if wanted is None else wanted).encode() in made


@settings(deadline=None, max_examples=examples.of(60))
@given(st.lists(st.sampled_from([*PIECES, CALL]), max_size=12), st.lists(st.integers(0, 99), max_size=6), st.booleans())
def test_any_answer_streams_as_it_is_whole(words: list[str], cuts: list[int], shows: bool) -> None:
    text = "".join(words)
    ends = sorted(min(cut, len(text)) for cut in cuts)
    for form in (FORM, None):
        writer = MessagesWriter(MessageHead("msg_1", "base", 5), form, "r", max_tokens=100, shows_thinking=shows)
        raw, usage = b"", CallUsage(5, 7, 3)
        for begin, end in zip([0, *ends], ends, strict=False):
            raw += b"".join(writer.frames(Piece(0, text[begin:end])))
        last = writer.frames(Piece(0, text[ends[-1] if ends else 0 :], finish="stop"))
        raw += b"".join([*last, writer.last_frames(usage)])
        made = held_to("message", json.loads(orjson.dumps(writer.whole([Piece(0, text, finish="stop")], usage))))
        try:
            told = built(events_of(raw))
        except ValueError:  # text that no grammar allows, which the client can't parse
            continue
        assert told == made
