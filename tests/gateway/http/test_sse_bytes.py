"""The bytes of streams: frames, pings, errors in mid-stream, and headers that wait for admission."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx2
import orjson
import pytest
from helpers.scripted_fleet import RunningGateway, Script, ScriptedFleet, gateway_client
from helpers.waiting import wait_until

from protocol.queue.bus import Bus
from protocol.wire import messages as m
from protocol.wire.errors import AdapterRefused, WorkerLost

CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "stream": True}
COMPLETION = {"model": "base", "prompt": "hi", "stream": True, "max_tokens": 60}


def frames_of(raw: bytes) -> list[bytes]:
    assert raw.endswith(b"\n\n")
    return raw.removesuffix(b"\n\n").split(b"\n\n")


def chunks_of(raw: bytes) -> list[dict]:
    return [orjson.loads(frame.removeprefix(b"data: ")) for frame in frames_of(raw) if frame.startswith(b"data: {")]


async def test_streamed_text_is_the_whole_text(
    subtests: pytest.Subtests, http: httpx2.AsyncClient, fleet: ScriptedFleet
) -> None:
    for stop in [None, "you", ["zzz", "ö"], "😀", ["are", "w"], ", how are you?"]:
        for chunk in [1, 2, 3, 7, 100]:
            with subtests.test(chunk=chunk, stop=stop):
                fleet.script = lambda submit, body, chunk=chunk: Script(chunk=chunk)
                streamed = await http.post("/v1/completions", json={**COMPLETION, "stop": stop})
                whole = await http.post("/v1/completions", json={**COMPLETION, "stop": stop, "stream": False})
                text = whole.json()["choices"][0]["text"]
                stops = [stop] if isinstance(stop, str) else stop or []
                cut = min([at for s in stops if (at := Script().text.find(s)) >= 0], default=len(Script().text))
                assert text == Script().text[:cut]
                chunks = chunks_of(streamed.content)
                assert "".join(c["choices"][0]["text"] for c in chunks) == text
                assert "\ufffd" not in text
                assert [c["choices"][0]["finish_reason"] for c in chunks][-1] == whole.json()["choices"][0][
                    "finish_reason"
                ]


async def test_cut_characters_appear_at_the_end(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    fleet.script = lambda submit, body: Script(text="😀")
    body = {**COMPLETION, "max_tokens": 2}
    chunks = chunks_of((await http.post("/v1/completions", json=body)).content)
    whole = (await http.post("/v1/completions", json={**body, "stream": False})).json()
    assert whole["choices"][0]["text"] == "".join(c["choices"][0]["text"] for c in chunks) == "\ufffd"
    assert whole["choices"][0]["finish_reason"] == "length"


async def test_each_choice_starts_and_ends_once(http: httpx2.AsyncClient, fleet: ScriptedFleet) -> None:
    answer = await http.post("/v1/chat/completions", json={**CHAT, "n": 5})
    by_index: dict[int, list[dict]] = {}
    for chunk in chunks_of(answer.content):
        [choice] = chunk["choices"]
        by_index.setdefault(choice["index"], []).append(choice)
    assert sorted(by_index) == list(range(5))
    for choices in by_index.values():
        assert [choice["delta"].get("role") for choice in choices] == ["assistant"] + [None] * (len(choices) - 1)
        assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
        assert "".join(choice["delta"].get("content", "") for choice in choices) == Script().text
    assert answer.content.endswith(b"\n\ndata: [DONE]\n\n")
    assert b"usage" not in answer.content


async def test_pings_keep_a_waiting_stream_alive(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    fleet.script = lambda submit, body: Script(hold_after=3)
    async with (
        gateway_client(bus, model_folder, keepalive_s=0.05) as http,
        http.stream("POST", "/v1/completions", json=COMPLETION) as answer,
    ):
        raw = b""
        async for part in answer.aiter_raw():
            raw += part
            if raw.count(b": ping\n\n") >= 2:
                fleet.go.set()
    text = "".join(c["choices"][0]["text"] for c in chunks_of(raw))
    assert text == Script().text
    assert raw.endswith(b"data: [DONE]\n\n")
    begun = raw[raw.index(b"data: ") :]  # on a busy machine, it is queued for longer than the ping interval
    assert {frame for frame in frames_of(begun) if not frame.startswith(b"data: ")} == {b": ping"}


async def test_a_queued_stream_gets_headers_and_pings_before_its_first_token(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path
) -> None:
    fleet.assigning.clear()
    async with (
        gateway_client(bus, model_folder, keepalive_s=0.05) as http,
        http.stream("POST", "/v1/chat/completions", json=CHAT) as answer,
    ):
        assert answer.status_code == 200
        raw = b""
        async for part in answer.aiter_raw():
            raw += part
            fleet.assigning.set()
    assert raw.startswith(b": queued, 0 ahead of it\n\n")
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks_of(raw)) == Script().text


@pytest.mark.parametrize("stream", [True, False])
async def test_an_error_before_the_first_token_is_a_status(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, stream: bool
) -> None:
    fleet.script = lambda submit, body: Script(text="", eos=False, error=AdapterRefused(["rank 0", "no B"]))
    answer = await http.post("/v1/chat/completions", json={**CHAT, "stream": stream})
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-should-retry"] == "false"
    assert answer.json()["error"]["code"] == "adapter_refused"
    assert answer.json()["error"]["message"] == "rank 0; no B"


async def test_one_failing_choice_ends_the_others(
    http: httpx2.AsyncClient, fleet: ScriptedFleet, gateway: RunningGateway, bus: Bus
) -> None:
    def script(submit: m.RequestHead, body: m.Body) -> Script:
        if submit.rid.endswith("-0"):
            return Script(text="", eos=False, error=WorkerLost("gone"))
        return Script(hold_after=1)

    fleet.script = script
    answer = await http.post("/v1/chat/completions", json={**CHAT, "n": 2, "stream": False})
    assert answer.status_code == 500
    assert answer.headers["x-should-retry"] == "true"
    other = fleet.seen[0][0].rid.rpartition("-")[0] + "-1"
    fleet.go.set()

    async def is_cancelled() -> bool:
        [facts] = await bus.requests([other])
        return facts is not None and facts.state == "cancelled"

    await wait_until(is_cancelled, "the other choice is cancelled")


async def test_who_waits_is_told_for_what(bus: Bus, fleet: ScriptedFleet, model_folder: Path) -> None:
    """The queue position, then the progress of the adapter's download, then the answer."""
    await fleet.add_adapter("mine", "d1")
    fleet.assigning.clear()
    fleet.script = lambda submit, body: Script(hold_after=0)
    async with (
        gateway_client(bus, model_folder, keepalive_s=0.05) as http,
        asyncio.TaskGroup() as group,
    ):
        first = group.create_task(http.post("/v1/chat/completions", json=CHAT))
        await wait_until(lambda: fleet.seen, "the first is queued")
        async with http.stream("POST", "/v1/chat/completions", json={**CHAT, "model": "mine"}) as answer:
            lines = answer.aiter_lines()

            async def comes(line: str) -> None:
                async for found in lines:
                    assert not found.startswith("data"), found
                    if found == line:
                        return

            await comes(": queued, 1 ahead of it")
            fleet.assigning.set()
            await comes(": its adapter is being fetched")
            fleet.host = ["d1"]
            await fleet.beat()
            await comes(": its adapter is being loaded")
            fleet.resident = ["d1"]
            await fleet.beat()
            await comes(": its prompt is being processed")
            fleet.go.set()
            rest = [line async for line in lines]
            assert rest[-2] == "data: [DONE]"
            assert not any(line.startswith(":") for line in rest[rest.index(first_data(rest)) :])
        await first


def first_data(lines: list[str]) -> str:
    return next(line for line in lines if line.startswith("data"))
