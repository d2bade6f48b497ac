"""Events of the Responses API, checked against the official client's types and against each other."""

from __future__ import annotations

from typing import Any

import orjson
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

Event = dict[str, Any]

_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def events_of(raw: bytes) -> list[Event]:
    """Return the events of a stream; assert that their numbers have no gap."""
    events: list[Event] = []
    for frame in raw.decode().split("\n\n"):
        lines = [line for line in frame.split("\n") if line and not line.startswith(":")]
        if not lines:
            continue
        kind, data = lines
        event = orjson.loads(data.removeprefix("data: "))
        assert kind == f"event: {event['type']}"
        _EVENT.validate_python(event)
        events.append(event)
    first = events[0]["sequence_number"] if events else 0
    assert [event["sequence_number"] for event in events] == list(range(first, first + len(events)))
    return events


def held_to(response: dict[str, Any]) -> dict[str, Any]:
    """Return `response` after validating it against the official client's type."""
    Response.model_validate(response)
    return response


def built(events: list[Event]) -> dict[str, Any]:
    """Return the response built from a whole stream; its deltas, its items and its last event must agree."""
    items: list[dict[str, Any]] = []
    for event in events:
        kind = event["type"]
        if kind == "response.output_item.added":
            assert event["output_index"] == len(items)
            items.append(dict(event["item"]))
        elif kind == "response.content_part.added":
            items[-1]["content"] = [dict(event["part"])]
        elif kind in ("response.output_text.delta", "response.reasoning_text.delta"):
            assert event["item_id"] == items[-1]["id"]
            items[-1]["content"][0]["text"] += event["delta"]
            if "logprobs" in event:
                items[-1]["content"][0]["logprobs"] += event["logprobs"]
        elif kind == "response.function_call_arguments.delta":
            items[-1]["arguments"] += event["delta"]
        elif kind in ("response.output_text.done", "response.reasoning_text.done"):
            assert items[-1]["content"][0]["text"] == event["text"]
        elif kind == "response.function_call_arguments.done":
            assert items[-1]["arguments"] == event["arguments"]
        elif kind == "response.content_part.done":
            assert items[-1]["content"][0] == event["part"]
        elif kind == "response.output_item.done":
            assert {**items[-1], "status": event["item"]["status"]} == event["item"]
            items[-1] = event["item"]
    last = events[-1]
    assert last["type"] in ("response.completed", "response.incomplete", "response.failed")
    if last["type"] != "response.failed":
        assert last["response"]["output"] == items
    return held_to(last["response"])
