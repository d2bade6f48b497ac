"""Background responses under faults, as turns of conversations: polled, resumed, cancelled, or two at once.

Whatever dies, each response has one end; every read of its events returns the same events; and its conversation gets
its turn once, complete.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from chaos.clients.client import GIVE_UP_S, PAUSE_S
from chaos.clients.insistent import Insistent

WAYS = ("poll", "poll", "resume", "resume", "resume", "cancel")
ENDED = ("completed", "incomplete", "failed", "cancelled")
LAST = {f"response.{status}" for status in ENDED}
MOST_TOKENS = (4, 20, 60)
PAGE = 3  # items

Json = dict[str, Any]


class LostError(Exception):
    """The requested object does not exist: a queue that lost power may have lost it."""


@dataclass(slots=True)
class Conversed:
    """The result of one conversation."""

    began_s: float
    ended_s: float = 0.0
    wrong: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)  # violations that no fault excuses
    ends: list[tuple[str, str]] = field(default_factory=list)  # (event type, id) of each response


class ResponseClient:
    """Holds conversations at any of the gateways at `urls`, which may die."""

    def __init__(self, urls: Sequence[str], key: str, models: Sequence[str]) -> None:
        """key: the client's API key; "" for a fleet without keys."""
        self._http = Insistent(urls, key)
        self._models = models

    async def close(self) -> None:
        """Close all connections."""
        await self._http.close()

    async def converse(self, num_turns: int, rng: random.Random) -> Conversed:
        """Hold one conversation; return its result."""
        told = Conversed(time.monotonic())
        try:
            await self._converse(num_turns, rng, told)
        except LostError as error:
            told.wrong.append(str(error))
        told.ended_s = time.monotonic()
        return told

    async def _converse(self, num_turns: int, rng: random.Random, told: Conversed) -> None:
        begin = {"role": "user", "content": "Begin."}
        conversation = (await self._ask("POST", "/v1/conversations", json={"items": [begin]}))["id"]
        groups: list[list[tuple[str, Json]]] = []  # (input, response) of the turns that were submitted together
        for _ in range(num_turns):
            texts = [uuid.uuid4().hex for _ in range(rng.choice((1, 1, 2)))]
            responses = [await self._begin(conversation, text, rng) for text in texts]
            ways = [rng.choice(WAYS) for _ in texts]
            ends = await asyncio.gather(
                *(self._follow(response["id"], way, rng, told) for response, way in zip(responses, ways, strict=True))
            )
            told.ends += [(f"response.{end['status']}", end["id"]) for end in ends]
            groups.append(list(zip(texts, ends, strict=True)))
        items = await self._items(conversation)
        told.wrong += misplaced(items, groups)
        told.doubled += doubled(items)

    async def _begin(self, conversation: str, text: str, rng: random.Random) -> Json:
        body = {
            "model": rng.choice(list(self._models)), "input": text, "conversation": conversation, "background": True,
            "max_output_tokens": rng.choice(MOST_TOKENS), "temperature": 0,
        }  # fmt: skip
        return await self._ask("POST", "/v1/responses", json=body, headers={"idempotency-key": uuid.uuid4().hex})

    async def _follow(self, response_id: str, way: str, rng: random.Random, told: Conversed) -> Json:
        """Follow a response to its end in the given way, and return it; violations are added to `told`."""
        path = f"/v1/responses/{response_id}"
        reads: list[list[Json]] = []
        if way == "resume":
            reads.append(await self._resumed(path, rng))
        elif way == "cancel":
            await asyncio.sleep(rng.uniform(0, 0.5))
            await self._ask("POST", f"{path}/cancel")
        end = await self._ended(path)
        reads += [await self._resumed(path, rng) for _ in range(2)]
        told.wrong += [f"{response_id} ({way}): {what}" for what in wrong_events(end, reads)]
        return end

    async def _ended(self, path: str) -> Json:
        began_s = time.monotonic()
        while time.monotonic() < began_s + GIVE_UP_S:
            response = await self._ask("GET", path)
            if response["status"] in ENDED:
                return response
            await asyncio.sleep(PAUSE_S)
        raise LostError(f"{path} has never ended")

    async def _resumed(self, path: str, rng: random.Random) -> list[Json]:
        """Return all events of a response, read in several pieces, each resumed where the previous one ended."""
        events: list[Json] = []
        began_s = time.monotonic()
        while not (events and events[-1]["type"] in LAST):
            if time.monotonic() > began_s + GIVE_UP_S:
                raise LostError(f"the stream of {path} has never ended")
            if time.monotonic() > began_s + 5:
                await self._ask("GET", path)  # raises if the response is lost
            after = f"&starting_after={events[-1]['sequence_number']}" if events else ""
            most = rng.choice((1, 5, 1000))  # number of events after which the client disconnects
            raw, num = b"", len(events)
            async for part in self._http.read(f"{path}?stream=true{after}"):
                raw += part
                whole, _, raw = raw.rpartition(b"\n\n")
                events += [event for event in events_of(whole) if event["type"] != "error"]
                if len(events) - num >= most:
                    break
            if len(events) == num:
                await asyncio.sleep(PAUSE_S)
        return events

    async def _items(self, conversation: str) -> list[Json]:
        items: list[Json] = []
        more = True
        while more:
            after = f"&after={items[-1]['id']}" if items else ""
            page = await self._ask("GET", f"/v1/conversations/{conversation}/items?order=asc&limit={PAGE}{after}")
            items += page["data"]
            more = page["has_more"]
        return items

    async def _ask(self, method: str, path: str, **options: Any) -> Json:
        answer = await self._http.ask(method, path, **options)
        if isinstance(answer.get("error"), str):  # a response's own error is an object, not a string
            raise LostError(answer["error"])
        return answer


def events_of(raw: bytes) -> list[Json]:
    """Return the events in a part of a stream."""
    lines = [line for line in raw.split(b"\n") if line.startswith(b"data: ")]
    return [orjson.loads(line.removeprefix(b"data: ")) for line in lines]


def wrong_events(end: Json, reads: Sequence[Sequence[Json]]) -> list[str]:
    """Return the errors in the events of a response, given several reads of them and its end."""
    wrong = [f"it has failed: {end['error']}"] if end["status"] == "failed" else []
    for events in reads:
        numbers = [event["sequence_number"] for event in events]
        if numbers != list(range(len(events))):
            wrong.append(f"events are numbered {numbers}")
        lasts = [event["type"] for event in events if event["type"] in LAST]
        if len(lasts) != 1 or events[-1]["type"] not in LAST:
            wrong.append(f"it ends with {lasts}")
        elif events[-1]["response"] != end:
            wrong.append("its last event has another response than GET")
        if events != reads[0]:
            wrong.append("its events differ when they are read again")
    return wrong


def doubled(items: Sequence[Json]) -> list[str]:
    """Return a message for each item or turn input that a conversation holds more than once."""
    inputs = [item["content"][0].get("text") for item in items if item.get("role") == "user" and item["content"]]
    named = [Counter(item["id"] for item in items), Counter(inputs)]
    return [f"{name} is there {num} times" for counted in named for name, num in counted.items() if num > 1]


def misplaced(items: Sequence[Json], groups: Sequence[Sequence[tuple[str, Json]]]) -> list[str]:
    """Return the errors in a conversation's items.

    After the first item come the turns of all responses with an answer, each complete and once. Turns of one group,
    which were submitted together, may come in any order; the groups keep theirs.
    """
    wrong: list[str] = []
    at = 1
    for group in groups:
        left = {text: end["output"] for text, end in group if end["status"] in ("completed", "incomplete")}
        while left:
            text = items[at]["content"][0].get("text", "") if at < len(items) and items[at].get("content") else ""
            if text not in left:
                return [*wrong, f"item {at} of {len(items)} is {text!r:.60}, and not one of {sorted(left)}"]
            output = left.pop(text)
            if list(items[at + 1 : at + 1 + len(output)]) != output:
                wrong.append(f"the output of {text} is not what its response has")
            at += 1 + len(output)
    if at != len(items):
        wrong.append(f"there are {len(items)} items instead of {at}")
    return wrong
