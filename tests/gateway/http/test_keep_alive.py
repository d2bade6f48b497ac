"""Streams that started to wait before their calls were submitted: keep-alives, errors, cancellation."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from helpers.asgi import AsgiClient
from redis.exceptions import TimeoutError as RedisTimeoutError
from starlette.responses import Response

from gateway.answers.call_response import CallResponse, SentAnswer
from gateway.overload.admission import Admission
from gateway.overload.cost import COST, RequestCost
from protocol.runtime.settings import Settings
from protocol.wire.errors import LorafleetError, NotFound, Overloaded


class Panic(BaseException):
    """Equivalent of pyo3's PanicException."""


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (NotFound("no such adapter", code="model_not_found"), "model_not_found"),
        (RedisTimeoutError("timeout writing to the queue"), "queue_unavailable"),
        (ZeroDivisionError(), "internal_error"),
        (Panic("Rust"), "internal_error"),
        (None, "internal_error"),  # returns a whole answer after a stream has started
    ],
)
async def test_whatever_goes_wrong_ends_it_with_an_event(failure: BaseException | None, code: str) -> None:
    go = asyncio.Event()

    async def answer() -> Response:
        await go.wait()
        if failure is None:
            return Response(b"whole")
        raise failure

    client = AsgiClient(lambda message: message.get("body", b"").startswith(b":") and go.set())
    response = CallResponse(answer(), stream=True, keepalive_s=0.01)
    await response({"type": "http"}, client.receive, client.send)
    assert [message.get("status") for message in client.sent] == [200] + [None] * (len(client.sent) - 1)
    last = client.sent[-1]
    assert not last["more_body"]
    assert json.loads(last["body"].removeprefix(b"data: "))["error"]["code"] == code


class Noting(SentAnswer):
    """Sends one part, and records that it was closed."""

    closed = False

    async def send(self, to: CallResponse) -> None:
        to.client()
        await to.begin([])
        await to.write(b"end", more=False)

    def failed(self, error: LorafleetError) -> bytes:
        return b"failed"

    async def close(self) -> None:
        self.closed = True


async def test_an_answer_is_closed_whenever_its_task_is_cancelled() -> None:
    turns = 1
    while True:
        answer, client = Noting(), AsgiClient()

        async def coming(answer: Noting = answer) -> Noting:
            return answer

        response = CallResponse(coming(), stream=True, keepalive_s=30)
        task = asyncio.create_task(response({"type": "http"}, client.receive, client.send))
        for _ in range(turns):
            await asyncio.sleep(0)
        was_done = task.done()
        task.cancel()
        await asyncio.wait([task])
        assert answer.closed or not client.sent, turns
        if was_done:
            break
        turns += 1
    assert turns > 3


async def test_what_goes_wrong_soon_is_raised_before_anything_is_sent() -> None:
    async def answer() -> Response:
        raise NotFound("no such adapter")

    async def never(message: Any = None) -> Any:
        raise AssertionError

    with pytest.raises(NotFound):
        await CallResponse(answer(), stream=True, keepalive_s=30.0)({"type": "http"}, never, never)


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_has_ended_when_its_client_has_left(stream: bool) -> None:
    ended = False

    async def answer() -> Response:
        nonlocal ended
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # as if it notified the queue
            ended = True
        raise AssertionError

    client = AsgiClient()
    client.left.set()
    before = asyncio.all_tasks()
    await CallResponse(answer(), stream=stream, keepalive_s=0.01)({"type": "http"}, client.receive, client.send)
    assert ended
    assert stream or not client.sent
    assert asyncio.all_tasks() == before


@pytest.mark.parametrize("waits", [False, True])
async def test_a_stream_has_no_headers_before_its_call_may_still_be_refused(waits: bool) -> None:
    """A call on its way to the queue may be refused; one that waits for its adapter is kept alive."""
    admission = Admission(Settings(), lambda: None, lambda: 0.0)
    go, sent = asyncio.Event(), list[dict[str, Any]]()

    async def answer() -> Response:
        if waits:
            admission.leave_inbound()
        await go.wait()
        raise Overloaded("the queue is full", 1.0)

    async def receive() -> dict[str, Any]:
        if not waits:
            go.set()  # called once the answer is late
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)
        go.set()

    COST.set(RequestCost())
    admission.enter()
    response = CallResponse(answer(), stream=True, keepalive_s=0.01)
    if waits:
        await response({"type": "http"}, receive, send)
        assert sent[0]["status"] == 200
    else:
        with pytest.raises(Overloaded):
            await response({"type": "http"}, receive, send)
        assert sent == []


class Running:
    """A generation, reduced to its end."""

    num_closed = 0

    async def close(self) -> None:
        self.num_closed += 1
        await asyncio.sleep(0)  # as if it notified the queue


class Answering(SentAnswer):
    """Sends an answer in several turns of the loop."""

    def __init__(self, generation: Any) -> None:
        self.generation = generation

    async def send(self, to: CallResponse) -> None:
        for _ in range(3):
            await asyncio.sleep(0)

    def failed(self, error: LorafleetError) -> bytes:
        raise AssertionError

    async def close(self) -> None:
        await self.generation.close()


@pytest.mark.parametrize("stubborn", [False, True])
@pytest.mark.parametrize("leaves", [False, True])
async def test_what_has_begun_is_closed_whenever_its_call_is_ended(stubborn: bool, leaves: bool) -> None:
    """Cancelled at each turn of the loop, or abandoned by its client; a `stubborn` answer comes nevertheless."""
    for num_turns in range(1, 16):
        begun: list[Running] = []

        async def answer(begun: list[Running] = begun) -> SentAnswer:
            for _ in range(4):
                try:
                    await asyncio.sleep(0)
                except asyncio.CancelledError:
                    if not stubborn:
                        raise
            begun.append(Running())
            return Answering(begun[0])

        async def receive(num_turns: int = num_turns) -> dict[str, Any]:
            if not leaves:
                await asyncio.Event().wait()
            for _ in range(num_turns):
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            await asyncio.sleep(0)

        keepalive_s = 0.0 if leaves else 30.0
        response = CallResponse(answer(), stream=True, keepalive_s=keepalive_s)
        task = asyncio.create_task(response({"type": "http"}, receive, send))
        for _ in range(num_turns):
            await asyncio.sleep(0)
        if not leaves:
            task.cancel()
        await asyncio.wait([task])
        assert [one.num_closed for one in begun] == [1] * len(begun), num_turns
