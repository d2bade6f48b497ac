"""Clients that retry as a careful user does, and record everything that they are shown.

A call that was cut off or refused is repeated at another gateway. With an Idempotency-Key the repetition must return
the same call, delivered from its first token.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx2
import orjson

from chaos.clients.asks import Ask
from protocol.wire.lines import aiter_lines

Style = Literal["stream", "whole", "keyed stream", "keyed whole", "job", "vector"]
STYLES: tuple[Style, ...] = ("stream", "stream", "whole", "keyed stream", "keyed stream", "keyed whole", "job")
"""How texts are requested; the usual ways occur more often."""

GIVE_UP_S = 300.0
"""Seconds after which a call is given up: far longer than any pause, so that a late answer is not a fault."""

PAUSE_S = 0.2
READ_TIMEOUT_S = GIVE_UP_S

Outcome = Literal["complete", "cut", "refused", "failed"]


@dataclass(slots=True)
class Attempt:
    """One HTTP call, and everything its client was shown."""

    url: str
    began_s: float  # time.monotonic
    ended_s: float = 0.0
    outcome: Outcome = "cut"
    code: str = ""  # of the error
    detail: str = ""
    call: str = ""  # the call's id without its prefix; its request in the queue is `call-0`
    text: str = ""
    finishes: list[str] = field(default_factory=list)
    num_done: int = 0
    usage: dict[str, Any] = field(default_factory=dict)
    vector: list[float] = field(default_factory=list)

    def take_line(self, line: str) -> None:
        """Process one line of a stream of server-sent events."""
        if line == "data: [DONE]":
            self.num_done += 1
        elif line.startswith("data: "):
            self.take_event(orjson.loads(line.removeprefix("data: ")))

    def take_event(self, event: dict[str, Any]) -> None:
        """Process one chunk, a whole answer, or an error."""
        if "error" in event:
            self.outcome = "failed"
            self.code, self.detail = str(event["error"]["code"]), event["error"]["message"]
            return
        self.call = event["id"].removeprefix("cmpl-")
        for choice in event["choices"]:
            self.text += choice["text"]
            if choice["finish_reason"]:
                self.finishes.append(choice["finish_reason"])
        self.usage = event.get("usage") or self.usage

    def refuse(self, status: int, raw: bytes, headers: httpx2.Headers) -> None:
        """Record an HTTP error."""
        try:
            error = orjson.loads(raw)["error"]
        except orjson.JSONDecodeError:  # every error must be JSON: this is a violation of its own
            self.outcome, self.code, self.detail = "failed", "not_json", f"{status}: {raw[:200]!r}"
            return
        self.outcome = "refused" if headers.get("x-should-retry") == "true" and status in (429, 503) else "failed"
        self.code, self.detail = str(error["code"]), f"{status}: {error['message']}"


@dataclass(slots=True)
class Call:
    """A user's request, and the attempts to get its answer."""

    ask: Ask
    style: Style
    began_s: float
    attempts: list[Attempt] = field(default_factory=list)
    progress: list[tuple[float, int]] = field(default_factory=list)  # (time, characters) whenever the known text grew
    num_known: int = 0

    @property
    def is_complete(self) -> bool:
        """Whether the last attempt got the whole answer."""
        return bool(self.attempts) and self.attempts[-1].outcome == "complete"

    @property
    def is_keyed(self) -> bool:
        """Whether all attempts share an Idempotency-Key, and so are one request."""
        return self.style not in ("stream", "whole", "vector")

    def note(self, attempt: Attempt) -> None:
        """Record the time if the attempt has more text than all attempts before."""
        if len(attempt.text) > self.num_known:
            self.num_known = len(attempt.text)
            self.progress.append((time.monotonic(), self.num_known))


class Client:
    """Sends requests to the gateways at `urls`, which may die."""

    def __init__(self, urls: Sequence[str], key: str = "") -> None:
        """key: the client's API key; "" for a fleet without keys."""
        self._urls = urls
        self._next = 0
        limits = httpx2.Limits(max_keepalive_connections=0)  # a connection from before a kill would only fail
        shown = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx2.AsyncClient(timeout=READ_TIMEOUT_S, trust_env=False, limits=limits, headers=shown)

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def ask(self, ask: Ask, style: Style, call: Call) -> None:
        """Repeat the request until it is answered or GIVE_UP_S have passed. Record every attempt in `call`."""
        headers = {"idempotency-key": uuid.uuid4().hex} if call.is_keyed else {}
        while not call.is_complete and time.monotonic() < call.began_s + GIVE_UP_S:
            if call.attempts:
                await asyncio.sleep(PAUSE_S)
            self._next += 1
            attempt = Attempt(self._urls[self._next % len(self._urls)], time.monotonic())
            call.attempts.append(attempt)
            with contextlib.suppress(httpx2.TransportError):
                await self._attempt(ask, style, headers, call)
            attempt.ended_s = time.monotonic()

    async def _attempt(self, ask: Ask, style: Style, headers: dict[str, str], call: Call) -> None:
        attempt = call.attempts[-1]
        if style == "job":
            await self._job(ask, headers, call)
        elif style == "vector":
            await self._vector(ask, call)
        elif style.endswith("whole"):
            answer = await self._http.post(
                f"{attempt.url}/v1/completions", json=ask.body(stream=False), headers=headers
            )
            if answer.status_code != 200:
                attempt.refuse(answer.status_code, answer.content, answer.headers)
                return
            attempt.take_event(answer.json())
            attempt.num_done = 1
            self._end(call)
        else:
            await self._stream(ask, headers, call)

    async def _vector(self, ask: Ask, call: Call) -> None:
        attempt = call.attempts[-1]
        body = {"model": ask.model, "input": ask.prompt}
        answer = await self._http.post(f"{attempt.url}/v1/embeddings", json=body)
        if answer.status_code != 200:
            attempt.refuse(answer.status_code, answer.content, answer.headers)
            return
        found = answer.json()
        if "error" in found:  # the error came after bytes that kept the connection alive
            attempt.take_event(found)
            return
        attempt.vector, attempt.usage = found["data"][0]["embedding"], found["usage"]
        attempt.outcome = "complete"

    async def _stream(self, ask: Ask, headers: dict[str, str], call: Call) -> None:
        attempt = call.attempts[-1]
        request = self._http.stream(
            "POST", f"{attempt.url}/v1/completions", json=ask.body(stream=True), headers=headers
        )
        async with request as answer:
            if answer.status_code != 200:
                attempt.refuse(answer.status_code, await answer.aread(), answer.headers)
                return
            async for line in aiter_lines(answer.aiter_bytes()):
                attempt.take_line(line)
                call.note(attempt)
        self._end(call)

    async def _job(self, ask: Ask, headers: dict[str, str], call: Call) -> None:
        attempt = call.attempts[-1]
        answer = await self._http.post(
            f"{attempt.url}/v1/completions", json=ask.body(stream=False, background=True), headers=headers
        )
        while True:
            if answer.status_code not in (200, 202):
                attempt.refuse(answer.status_code, answer.content, answer.headers)
                return
            job = answer.json()
            if job["status"] not in ("queued", "running"):
                break
            answer = await self._http.get(f"{attempt.url}/v1/jobs/{job['id']}", headers={"prefer": "wait=10"})
        if job["status"] != "completed":
            attempt.outcome, attempt.code = "failed", job["status"]
            attempt.detail = str(job["error"])
            return
        attempt.take_event(job["result"])
        attempt.num_done = 1
        self._end(call)

    def _end(self, call: Call) -> None:
        attempt = call.attempts[-1]
        call.note(attempt)
        if attempt.num_done and attempt.outcome == "cut":
            attempt.outcome = "complete"
