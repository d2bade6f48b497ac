"""What a stream is told that began to wait before its call was submitted."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from redis.exceptions import TimeoutError as RedisTimeoutError
from starlette.responses import Response

from gateway.http.keep_alive import KeepAliveResponse
from protocol.wire.errors import NotFound


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (NotFound("no such adapter", code="model_not_found"), "model_not_found"),
        (RedisTimeoutError("timeout writing to the queue"), "queue_unavailable"),
        (ZeroDivisionError(), "internal_error"),
    ],
)
async def test_whatever_goes_wrong_ends_it_with_an_event(failure: Exception, code: str) -> None:
    go, sent = asyncio.Event(), list[dict[str, Any]]()

    async def answer() -> Response:
        await go.wait()
        raise failure

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)
        if message.get("body", b"").startswith(b":"):
            go.set()

    response = KeepAliveResponse(answer(), stream=True, keepalive_s=0.01)
    await response({"type": "http"}, receive, send)
    assert sent[0]["status"] == 200
    last = sent[-1]
    assert not last["more_body"]
    assert json.loads(last["body"].removeprefix(b"data: "))["error"]["code"] == code
