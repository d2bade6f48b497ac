"""Internal failures become JSON in the format of the path, including exceptions like Rust panics."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from helpers.asgi import AsgiClient
from helpers.scripted_fleet import RunningGateway, Script, ScriptedFleet

from gateway.app.app import SLICE_BYTES, Envelope, send_in_slices
from gateway.calls.choices import TokenLogprob
from gateway.http.access import RouteTable
from gateway.openai.openai_write import CompletionWriter
from gateway.text.tokenizer import Encoder
from protocol.runtime.settings import Settings
from protocol.wire.tokens import TokenTable


class Panic(BaseException):
    """Equivalent of pyo3's PanicException."""


async def ask(app: Any, path: str = "/v1/x") -> httpx2.Response:
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://x") as http:
        return await http.post(path)


@pytest.mark.parametrize(("path", "fields"), [("/v1/x", {"error"}), ("/generate", {"error", "error_type"})])
async def test_a_panic_is_told_as_json(path: str, fields: set[str], caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise Panic("Rust")

    answer = await ask(Envelope(app, Settings(), RouteTable([])), path)
    assert answer.status_code == 500
    assert set(answer.json()) == fields
    assert answer.headers["x-request-id"]
    assert "Rust" in caplog.text
    assert "Rust" not in answer.text


async def test_what_ends_the_process_is_no_failure() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise KeyboardInterrupt

    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": []}
    with pytest.raises(KeyboardInterrupt):
        await Envelope(app, Settings(), RouteTable([]))(scope, None, None)  # type: ignore[arg-type]


async def test_a_json_answer_that_fails_midway_is_cut(
    fleet: ScriptedFleet, http: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that its client does not consider it complete; an error event within it would not be JSON."""
    fleet.script = lambda submit, body: Script(text="abc " * 100, eos=False, finish="length", chunk=10_000)
    num_made, made = 0, CompletionWriter._top

    def failing(self: CompletionWriter, tokens: TokenTable, token: TokenLogprob) -> Any:
        nonlocal num_made
        num_made += 1
        if num_made == 150:
            raise Panic("Rust")
        return made(self, tokens, token)

    monkeypatch.setattr(CompletionWriter, "_top", failing)
    read = bytearray()

    async def ask() -> None:
        body = {"model": "base", "prompt": "hi", "max_tokens": 200, "logprobs": 20}
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            async for part in answer.aiter_bytes():
                read.extend(part)

    with pytest.raises(httpx2.RemoteProtocolError):
        await ask()
    assert read.startswith(b"{")
    assert b"data:" not in read
    assert num_made == 150


async def test_a_gateway_outlives_a_panic_of_its_tokenizer(
    gateway: RunningGateway, fleet: ScriptedFleet, http: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def panic(*_: Any, **__: Any) -> Any:
        raise Panic("Rust")

    body, native = {"model": "base", "prompt": "hi"}, {"inputs": "hi"}
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "ids", panic)
        for stream in (True, False):
            answer = await http.post("/v1/completions", json={**body, "stream": stream})
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
        assert set((await http.post("/generate", json=native)).json()) == {"error", "error_type"}
    assert (await http.post("/v1/completions", json=body)).status_code == 200
    assert len(fleet.seen) == 1


@pytest.mark.parametrize("size", [0, 1, SLICE_BYTES, SLICE_BYTES + 1, 3 * SLICE_BYTES, 5 * SLICE_BYTES - 1])
@pytest.mark.parametrize("is_last", [True, False])
async def test_a_large_answer_is_handed_on_in_slices(size: int, is_last: bool) -> None:
    client = AsgiClient()
    body = bytes(range(256)) * (size // 256 + 1)
    await send_in_slices({"type": "http.response.body", "body": body[:size], "more_body": not is_last}, client.send)
    assert client.body == body[:size]
    assert [part["more_body"] for part in client.sent] == [True] * (len(client.sent) - 1) + [not is_last]
    assert all(len(part["body"]) <= SLICE_BYTES for part in client.sent)
