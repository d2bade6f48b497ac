"""Whatever a body holds, it gets an answer: a 4xx that says what is wrong, never a fault, never silence."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted_fleet import Script, ScriptedFleet, running_gateway
from tokenizers import Tokenizer

from gateway.http.errors import OPENAI_ERRORS
from gateway.lorax.bodies import CompatRequest, Parameters
from gateway.lorax.routes import shape_of
from gateway.openai.bodies import BODIES
from lorafleet.launcher.embedded import EmbeddedServer
from protocol.queue.bus import Bus

GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/completions": {"model": "base", "prompt": "hi", "max_tokens": 2},
    "/generate": {"inputs": "hi", "parameters": {"max_new_tokens": 2}},
    "/generate_stream": {"inputs": "hi", "parameters": {"max_new_tokens": 2}},
    "/": {"inputs": "hi", "parameters": {"max_new_tokens": 2}},
    "/tokenize": {"inputs": "hi"},
    "/v1/embeddings": {"model": "base", "input": ["hi"], "dimensions": 2, "encoding_format": "float"},
    "/classify_batch": {"inputs": ["hi"], "parameters": {"adapter_id": ""}},
    "/v1/unload_lora_adapter": {"lora_name": "nobody"},
}
FIELDS = {
    path: sorted(BODIES[path].model_fields) if path in BODIES else sorted(CompatRequest.model_fields) for path in GOOD
}

odd_text = st.one_of(
    st.sampled_from(
        ["", "\0", "\ud800", "\udfff\ud800", "\u202e", "a" * 5000, "null", "-1", "1e999", "base", "__proto__"]
    ),
    st.text(max_size=20),
)
odd_number = st.sampled_from(
    [0, -1, 1, 2, 1 << 31, 1 << 53, 1 << 63, -(1 << 64), 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan")]
)
odd_value = st.recursive(
    st.one_of(st.none(), st.booleans(), odd_number, odd_text),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(odd_text, inner, max_size=4)),
    max_leaves=12,
)
depths = st.sampled_from([10, 100, 600, 1023, 1024, 5000, 100_000])


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, bytes]:
    """A path, and bytes to send there: junk, deep nests, any JSON, or a good body with something odd in it."""
    path = draw(st.sampled_from(sorted(GOOD)))
    kind = draw(st.sampled_from(["bytes", "deep", "json", "field", "field", "field", "parameter", "cut"]))
    if kind == "bytes":
        return path, draw(st.binary(max_size=60))
    good = json.loads(json.dumps(GOOD[path]))
    if kind == "deep":
        depth, opening, closing = draw(depths), *draw(st.sampled_from([("[", "]"), ('{"a":', "}")]))
        nest = opening * depth + "1" + closing * depth
        field = draw(st.sampled_from(FIELDS[path]))
        return path, json.dumps({**good, field: "@"}).replace('"@"', nest).encode()
    if kind == "json":
        return path, json.dumps(draw(odd_value)).encode()
    if kind == "parameter" and "parameters" in good:
        good["parameters"][draw(st.sampled_from(sorted(Parameters.model_fields)))] = draw(odd_value)
    else:
        good[draw(st.one_of(st.sampled_from(FIELDS[path]), odd_text))] = draw(odd_value)
    raw = json.dumps(good).encode()
    return path, raw[: draw(st.integers(0, len(raw)))] if kind == "cut" else raw


@pytest.fixture(scope="module")
def url(queue_server: EmbeddedServer, model_folder: Path, tokenizer: Tokenizer) -> Iterator[str]:
    """A gateway and its scripted fleet in a thread of their own, so that examples need no event loop."""
    told: queue.Queue[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = queue.Queue()

    async def serve() -> None:
        bus, stop = Bus(queue_server.url), asyncio.Event()
        await bus._redis.flushall()
        fleet = ScriptedFleet(bus, tokenizer, script=lambda submit, body: Script(text="hi", chunk=64))
        fleet.assigning.set()
        await fleet.register()
        playing = asyncio.create_task(fleet.run())
        async with running_gateway(bus, model_folder, max_stop_strings=4) as gateway:
            told.put((gateway.url, asyncio.get_running_loop(), stop))
            await stop.wait()
        playing.cancel()
        await asyncio.gather(playing, return_exceptions=True)
        await bus._redis.flushall()
        await bus.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    address, loop, stop = told.get(timeout=30)
    yield address
    loop.call_soon_threadsafe(stop.set)
    thread.join()


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(sent=bodies())
def test_any_body_gets_an_answer(url: str, patient: httpx2.Client, sent: tuple[str, bytes]) -> None:
    path, body = sent
    answer = patient.post(url + path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code < 500, answer.content
    if answer.status_code >= 400:
        error = answer.json()["error"]
        message = error["message"] if shape_of(path) is OPENAI_ERRORS else error
        assert isinstance(message, str)
        assert message
        assert len(message) < 2000
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert b'"error"' not in answer.content


@pytest.fixture(scope="module")
def patient() -> Iterator[httpx2.Client]:
    """A client that waits ten seconds: silence is a failure."""
    with httpx2.Client(timeout=10, trust_env=False) as client:
        yield client
