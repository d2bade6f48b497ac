"""No request blocks the gateway's event loop for long, even at the largest size that is accepted."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import orjson
import pytest
import pytest_asyncio
from helpers.loop_lag import measured_lag
from helpers.scripted_fleet import ScriptedFleet, playing, running_gateway
from helpers.waiting import wait_until
from tokenizers import Tokenizer

from gateway.batches import results
from gateway.batches.lines import InputLines
from gateway.bodies import json_bodies
from gateway.openai import openai_calls
from gateway.overload import cost
from gateway.overload.large import PLAIN_BYTES
from gateway.responses import response_parse
from protocol.queue.bus import Bus
from protocol.queue.connection import line
from protocol.queue.connection.redis_client import SENT_BYTES

MOST_S = 0.6
"""Maximum CPU seconds of one round of the loop. The longest step, parsing 4 MB of JSON, takes 0.03 s on an idle core,
and ten times that on a busy machine.
"""

GRAMMAR = 65_000
BODY = 4_190_000
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def filled(unit: str, size: int, before: str = "", after: str = "") -> str:
    return before + unit * ((size - len(before) - len(after)) // len(unit)) + after


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "base", "prompt": "the dog", "max_tokens": 1, **fields}


def chat(content: Any = "the dog", **fields: Any) -> dict[str, Any]:
    return {"model": "base", "messages": [{"role": "user", "content": content}], "max_tokens": 1, **fields}


def tool(number: int, schema: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": f"f{number}", "parameters": schema}}


WIDE = {"type": "object", "properties": {f"a{i}": {} for i in range(4000)}}
REFERRING = {"$defs": {"a": WIDE}, "properties": {f"x{i}": {"allOf": [{"$ref": "#/$defs/a"}]} for i in range(40)}}
PATTERNS = {"patternProperties": {f"{i}(a{{9}})": {} for i in range(3000)}}
TOOLS = [tool(i, WIDE) for i in range(4)]
NAMED = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"function": {"name": "f0"}}] * 8_000}}
TAGS = [{"type": "tag", "begin": f"<{i}>", "content": {"type": "any_text"}, "end": "</>"} for i in range(130)]
LISTS = filled("[],", 48_000, "[", "1]")
ITEMS = [{"role": "user", "content": [{"type": "input_text", "text": "a"}] * 25} for _ in range(600)]
THOUGHTS = [{"type": "thinking", "thinking": "t" * 3_000_000}, *[{"type": "thinking", "thinking": "t"}] * 16_000]
CALLS = [{"function": {"name": f"f{i}", "arguments": {}}} for i in range(4_000)]

BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"a grammar of {unit!r} after {before!r}": (
            COMPLETIONS, completion(structured_outputs={"grammar": filled(unit, GRAMMAR, before)})
        )
        for unit, before in [
            ('\\"', ""), ("\\/", ""), ("1", "a{"), ("%json {", ""), ("[", "%json "), ("a ", "root ::= "),
            ("\\x41", 'root ::= "'), ("[", "root ::= "),
        ]
    },
    **{
        f"a regular expression of {unit!r}": (
            COMPLETIONS, completion(structured_outputs={"regex": filled(unit, GRAMMAR, before)})
        )
        for unit, before in [("[", ""), ("1", "a{"), ("(a{0})", ""), ("{", "")]
    },
    "a wide schema": (COMPLETIONS, completion(structured_outputs={"json": WIDE})),
    "a schema as text": (COMPLETIONS, completion(structured_outputs={"json": json.dumps(WIDE)})),
    "schemas that refer to each other": (COMPLETIONS, completion(structured_outputs={"json": REFERRING})),
    "patterns of names": (COMPLETIONS, completion(structured_outputs={"json": PATTERNS})),
    "structural tags": (
        COMPLETIONS, completion(structured_outputs={"structural_tag": {"format": {"type": "or", "elements": TAGS}}})
    ),
    "10,000 choices": (COMPLETIONS, completion(structured_outputs={"choice": ["abc"] * 10_000})),
    "a schema of LoRAX's": ("/generate", {"inputs": "a", "parameters": {"grammar": {"type": "json", "value": WIDE}}}),
    "a format of Ollama's": ("/api/chat", {"model": "base", "messages": [{"role": "user"}], "format": WIDE}),
    "tools": (CHAT, chat(tools=TOOLS)),
    "tools that are counted": ("/tokenize", {"model": "base", "messages": chat()["messages"], "tools": TOOLS}),
    "allowed tools": (CHAT, chat(tools=TOOLS[:1], tool_choice=NAMED)),
    "Anthropic's tools": (
        "/v1/messages", {**chat(), "tools": [{"name": f"f{i}", "input_schema": WIDE} for i in range(4)]}
    ),
    "tools of responses": (
        "/v1/responses", {"model": "base", "input": "a", "tools": [{"type": "function", **tool(i, WIDE)["function"]}
                                                                  for i in range(4)]}
    ),
    "parts of a message": (CHAT, chat([{"type": "text", "text": "a"}] * 16_000)),
    "parts of an item": ("/v1/responses", {"model": "base", "input": ITEMS}),
    "thoughts": ("/v1/messages", {**chat(), "messages": [{"role": "assistant", "content": THOUGHTS}]}),
    "calls without results": (
        "/api/chat", {"model": "base", "messages": [{"role": "assistant", "tool_calls": CALLS},
                                                  *[{"role": "tool", "content": "", "tool_name": "x"}] * 2000]}
    ),
    "arguments of a call": (
        CHAT, {"model": "base", "messages": [{"role": "assistant", "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":' + LISTS + "}"}}]}]}
    ),
    "variables of a template": (CHAT, chat(chat_template_kwargs={f"v{i}": [[]] for i in range(8_000)})),
    "stop strings": (COMPLETIONS, completion(stop=["a" * 1000 + f"{i:024}" for i in range(64)])),
    "metadata": (COMPLETIONS, completion(metadata={f"k{i}": "v" * 512 for i in range(16)})),
    "bias": (COMPLETIONS, completion(logit_bias={str(i).zfill(4000): 1 for i in range(300)})),
    "names nobody knows": (COMPLETIONS, completion(**{f"unknown_{i}_{'x' * 20}": 1 for i in range(60_000)})),
    "long names nobody knows": (COMPLETIONS, completion(**{f"{i}_{'x' * 6000}": "v" * 1000 for i in range(500)})),
    "a list of names": (COMPLETIONS, completion(model=["s3://" + "a/" * 500] * 3000)),
    "documents": ("/v1/rerank", {"model": "base", "query": "a", "documents": [{"text": "a"}] * 16_000}),
    "lists": (COMPLETIONS, completion(prompt=json.loads(LISTS))),
    "nested lists": (COMPLETIONS, completion(prompt=json.loads(filled("[" * 90 + "]" * 90 + ",", 32_000, "[", "1]")))),
}  # fmt: skip


async def play(url: str, tokenizer: Tokenizer, stop: threading.Event) -> None:
    async with playing(url, tokenizer):
        await asyncio.to_thread(stop.wait)


@pytest_asyncio.fixture
async def fleet(bus: Bus, tokenizer: Tokenizer) -> AsyncIterator[ScriptedFleet]:
    """A fleet whose worker runs in another thread, so that its CPU time is not counted; this one only registers it."""
    stop, scripted = threading.Event(), ScriptedFleet(bus, tokenizer)
    await scripted.register()
    thread = asyncio.create_task(asyncio.to_thread(lambda: asyncio.run(play(bus.url, tokenizer, stop))))
    yield scripted
    stop.set()
    await thread


@pytest_asyncio.fixture
async def http(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> AsyncIterator[httpx2.Client]:
    """A client to be used in threads, so that its time is not the loop's."""
    async with running_gateway(bus, model_folder, grammar_timeout_s=0.25) as gateway:
        with httpx2.Client(base_url=gateway.url, timeout=60) as plain:
            yield plain


def noting(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, size: Callable[..., int]) -> list[int]:
    """Wrap a function to record the sizes of its calls in the current thread, which is that of the event loop."""
    found: list[int] = []
    function, loop_thread = getattr(module, name), threading.get_ident()

    def noted(*args: Any, **options: Any) -> Any:
        if threading.get_ident() == loop_thread:
            found.append(size(*args, **options))
        return function(*args, **options)

    monkeypatch.setattr(module, name, noted)
    return found


async def test_no_body_holds_the_event_loop(
    http: httpx2.Client, subtests: pytest.Subtests, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = noting(monkeypatch, orjson, "loads", len)
    freed = noting(monkeypatch, cost, "free_slowly", len)
    judged = noting(monkeypatch, json_bodies, "check_parameters", lambda *_: current_bytes)
    headers = {"content-type": "application/json"}
    for name, (path, body) in BODIES.items():
        raw = json.dumps(body, separators=(",", ":")).encode()
        assert len(raw) <= BODY, name
        current_bytes = len(raw)
        with subtests.test(name):
            async with measured_lag(name) as lag:
                answer = await asyncio.to_thread(http.post, path, content=raw, headers=headers)
            assert answer.status_code < 500 or answer.status_code in (503, 529), answer.text  # too busy to compile
            assert lag.num_rounds > 0, "nothing was measured"
            assert lag.longest_s < MOST_S
            assert max([0, *read, *judged]) <= PLAIN_BYTES
            assert freed == []


ECHOED = completion(prompt="the quick brown fox " * 2000, echo=True, logprobs=20)
ANSWERS: dict[str, dict[str, Any]] = {
    "an echo with logprobs": ECHOED,
    "a stream of it": {**ECHOED, "stream": True},
}
"""Bodies with answers that take long to write."""


async def test_no_answer_holds_the_event_loop(
    http: httpx2.Client, fleet: ScriptedFleet, subtests: pytest.Subtests
) -> None:
    await fleet.set_context(http.base_url, 1 << 14)
    for name, body in ANSWERS.items():
        with subtests.test(name):
            async with measured_lag(name) as lag:
                answer = await asyncio.to_thread(http.post, COMPLETIONS, json=body)
            assert answer.status_code == 200, answer.text
            assert lag.longest_s < MOST_S


async def test_no_long_prompt_that_is_accepted_holds_the_event_loop(
    http: httpx2.Client, fleet: ScriptedFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of 250,000 tokens takes a megabyte: commands and replies with it are sent and read in slices."""
    await fleet.set_context(http.base_url, 1 << 20)
    packed = noting(monkeypatch, line, "_pack", lambda words: max(map(len, (w for w in words if isinstance(w, bytes)))))
    sent = noting(monkeypatch, asyncio.StreamWriter, "writelines", lambda _, parts: sum(map(len, parts)))
    text = "the quick brown fox " * 50_000
    for path, body in {COMPLETIONS: completion(prompt=text), CHAT: chat(text)}.items():
        async with measured_lag(f"a long prompt to {path}") as lag:
            answer = await asyncio.to_thread(http.post, path, json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["prompt_tokens"] > 250_000
        assert lag.longest_s < MOST_S
    assert max(packed) <= line.MAX_COMMAND_BYTES
    assert SENT_BYTES <= max(sent) < 2 * SENT_BYTES


async def test_no_conversation_holds_the_event_loop(
    http: httpx2.Client, fleet: ScriptedFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is put together from many bodies, so that it may have a multiple of what one of them may have."""
    await fleet.set_context(http.base_url, 1 << 18)
    item = {"role": "user", "content": [{"type": "input_text", "text": "a"}] * 1300}
    made = (await asyncio.to_thread(lambda: http.post("/v1/conversations", json={"items": [item]}))).json()
    read, parsed = noting(monkeypatch, orjson, "loads", len), noting(monkeypatch, response_parse, "messages_of", len)
    items = f"/v1/conversations/{made['id']}/items"
    for _ in range(15):
        assert (await asyncio.to_thread(lambda: http.post(items, json={"items": [item]}))).status_code == 200
    async with measured_lag("a conversation's items") as lag:
        page = await asyncio.to_thread(http.get, f"{items}?limit=100")
        asked = {"model": "base", "input": "a", "conversation": made["id"], "max_output_tokens": 16}
        answer = await asyncio.to_thread(lambda: http.post("/v1/responses", json=asked))
    assert len(page.json()["data"]) == 16
    assert page.headers["transfer-encoding"] == "chunked"  # written in slices
    assert answer.status_code == 200, answer.text
    assert max([0, *read]) <= PLAIN_BYTES
    assert parsed == []
    assert lag.longest_s < MOST_S


async def test_no_job_is_stored_on_the_event_loop(
    http: httpx2.Client, fleet: ScriptedFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fleet.set_context(http.base_url, 1 << 18)
    stored = noting(monkeypatch, openai_calls, "to_be_stored", lambda *_: 1)
    for path, body in ((CHAT, chat("a" * 200_000, echo=True)), (COMPLETIONS, completion(prompt=[[5] * 100_000] * 2))):
        job = {**body, "background": True}
        answer = await asyncio.to_thread(partial(http.post, path, json=job))
        assert answer.status_code == 202, answer.text
    assert stored == []


async def test_no_stored_response_holds_the_event_loop(
    http: httpx2.Client, fleet: ScriptedFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its input becomes one item of a conversation."""
    await fleet.set_context(http.base_url, 1 << 18)
    part = {"type": "input_text", "text": "a"}
    made = (await asyncio.to_thread(lambda: http.post("/v1/conversations", json={}))).json()
    asked = {"model": "base", "conversation": made["id"], "max_output_tokens": 16}
    body = json.dumps({**asked, "input": [{"role": "user", "content": [part] * 16_000}]}).encode()
    headers = {"content-type": "application/json"}
    items = f"/v1/conversations/{made['id']}/items"
    written = noting(monkeypatch, orjson, "dumps", lambda value, *_, **__: len(repr(value)))
    read = noting(monkeypatch, orjson, "loads", len)

    def ask() -> list[httpx2.Response]:
        answer = http.post("/v1/responses", content=body, headers=headers)
        own = http.get(f"/v1/responses/{answer.json()['id']}/input_items")
        page = http.get(items)  # adds the turn
        one = http.get(f"{items}/{page.json()['last_id']}")
        many = {"items": [{"role": "user", "content": [part] * 80}] * 20}
        return [
            answer,
            own,
            page,
            one,
            http.post(items, json=many),
            http.post("/v1/responses", json={**asked, "input": "a"}),
        ]

    async with measured_lag("a stored response") as lag:
        answers = await asyncio.to_thread(ask)
    assert [answer.status_code for answer in answers] == [200] * 6, answers[-1].text
    _, own, page, one, *_ = (answer.json() for answer in answers)
    assert own["data"][0]["content"] == page["data"][-1]["content"] == one["content"] == [part] * 16_000
    assert max(written) <= PLAIN_BYTES
    assert max([0, *read]) <= PLAIN_BYTES
    assert lag.longest_s < MOST_S


@pytest.mark.thorough
async def test_a_background_job_of_long_prompts_is_streamed_beside_others(
    http: httpx2.Client, fleet: ScriptedFleet
) -> None:
    await fleet.set_context(http.base_url, 1 << 14)
    job = (await asyncio.to_thread(lambda: http.post(COMPLETIONS, json={**ECHOED, "background": True}))).json()
    headers = {"prefer": "wait=30"}
    ended = (await asyncio.to_thread(lambda: http.get(f"/v1/jobs/{job['id']}", headers=headers))).json()
    assert ended["status"] == "completed"
    async with measured_lag("a job's stream") as lag:
        told = await asyncio.to_thread(lambda: http.get(f"/v1/jobs/{job['id']}/stream").text)
    assert told.endswith("data: [DONE]\n\n")
    assert lag.longest_s < MOST_S


async def test_no_query_or_header_holds_the_event_loop(http: httpx2.Client, subtests: pytest.Subtests) -> None:
    long = "1-" * 15_000
    for path in (f"/v1/jobs?after={long}", f"/v1/requests?after={long}", f"/v1/files?after={long}", f"/v1/jobs/{long}"):
        with subtests.test(path[:20]):
            async with measured_lag(path[:20]) as lag:
                answer = await asyncio.to_thread(http.get, path, headers={"prefer": "wait=" * 5000})
            assert answer.status_code < 500, answer.text
            assert lag.longest_s < MOST_S


def lines(url: str, **fields: str) -> list[bytes]:
    """Return lines of a batch as large as bodies may be, each with a field given as JSON."""
    shown = [b'{"custom_id":"%b","method":"POST","url":"%b","body":{"model":"base","prompt":"a","x":%b}}' %
             (name.encode(), url.encode(), value.encode()) for name, value in fields.items()]  # fmt: skip
    assert all(len(line) <= BODY for line in shown)
    return shown


def num_bytes(raw: str | bytes | msgspec.Raw, **_: Any) -> int:
    return len(raw if isinstance(raw, str) else memoryview(raw))


async def test_no_line_of_a_batch_holds_the_event_loop(
    http: httpx2.Client, fleet: ScriptedFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither do the answers."""
    await fleet.set_context(http.base_url, 1 << 14)
    checked = noting(monkeypatch, InputLines, "add", lambda *taken: len(taken[-1] or b""))
    decoded = noting(monkeypatch, msgspec.json, "decode", num_bytes)
    answered = noting(monkeypatch, results, "usage_of", len)
    size = BODY - 200
    wrong = lines(
        COMPLETIONS, lists=filled("[],", size, "[", "1]"),
        objects=filled('{"a":1},', size, "[", "1]"), deep="[" * 300 + "]" * 300,
        deepest="[" * 2_000_000 + "]" * 2_000_000,
    )  # fmt: skip
    good = json.dumps({"custom_id": "good", "method": "POST", "url": COMPLETIONS, "body": ECHOED}).encode()
    form = {"file": ("a.jsonl", b"\n".join([*wrong, good])), "purpose": (None, "batch")}
    async with measured_lag("lines of a batch") as lag:
        file = (await asyncio.to_thread(lambda: http.post("/v1/files", files=form))).json()
        asked = {"input_file_id": file["id"], "endpoint": COMPLETIONS, "completion_window": "24h"}
        batch = (await asyncio.to_thread(lambda: http.post("/v1/batches", json=asked))).json()

        async def has_ended() -> dict[str, Any] | None:
            seen = (await asyncio.to_thread(http.get, f"/v1/batches/{batch['id']}")).json()
            return seen if seen["status"] in ("completed", "failed", "expired") else None

        ended = await wait_until(has_ended, "the batch has ended", timeout_s=90)
    assert ended["status"] == "completed", ended
    assert ended["request_counts"] == {"total": 5, "completed": 1, "failed": 4}
    errors = (await asyncio.to_thread(http.get, f"/v1/files/{ended['error_file_id']}/content")).text.splitlines()
    assert {json.loads(line)["custom_id"] for line in errors} == {"lists", "objects", "deep", ""}
    output = (await asyncio.to_thread(http.get, f"/v1/files/{ended['output_file_id']}/content")).content
    assert len(output) > 100 * PLAIN_BYTES
    assert lag.longest_s < MOST_S
    assert max([0, *checked, *decoded, *answered]) <= PLAIN_BYTES
