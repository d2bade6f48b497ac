"""Answers of Anthropic's routes, checked against the official client's types, and messages built from events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
from pydantic_core import from_json

CONTRACT = Path(__file__).parents[1] / "gateway" / "anthropic" / "contract.json"
"""Kind of object -> JSON schema of its type in the official client; written by `contract.py` in the same folder."""

_VALIDATORS = {
    kind: jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    for kind, schema in json.loads(CONTRACT.read_text()).items()
}

Event = dict[str, Any]


def held_to(kind: str, value: Any) -> Any:
    """Return `value` after validating it against the official client's type."""
    _VALIDATORS[kind].validate(value)
    return value


def events_of(raw: bytes) -> list[Event]:
    """Return the events of a stream; assert the order that clients rely on."""
    found: list[Event] = []
    for block in raw.decode().split("\n\n")[:-1]:
        lines = [line for line in block.split("\n") if not line.startswith(":")]
        kind, data = lines
        event = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {event['type']}"
        if event["type"] == "error":
            held_to("error", event)
        elif event["type"] != "ping":
            found.append(held_to("event", event))
            continue
        found.append(event)
    return found


def built(events: list[Event]) -> dict[str, Any]:
    """Return the message that a client builds from events."""
    events = [event for event in events if event["type"] != "ping"]
    first, *middle, delta, last = events
    assert (first["type"], delta["type"], last["type"]) == ("message_start", "message_delta", "message_stop")
    message = first["message"]
    assert (message["content"], message["stop_reason"]) == ([], None)
    is_open, arguments = False, ""
    for event in middle:
        if event["type"] == "content_block_start":
            assert not is_open
            assert event["index"] == len(message["content"])
            message["content"].append(event["content_block"])
            is_open, arguments = True, ""
        elif event["type"] == "content_block_delta":
            assert is_open
            assert event["index"] == len(message["content"]) - 1
            block, change = message["content"][-1], event["delta"]
            if change["type"] == "input_json_delta":
                arguments += change["partial_json"]
            else:
                field = change["type"].removesuffix("_delta")
                block[field] += change[field]
        else:
            assert event == {"type": "content_block_stop", "index": len(message["content"]) - 1}
            if message["content"][-1]["type"] == "tool_use":
                message["content"][-1]["input"] = from_json(arguments or "{}", allow_partial=True)  # same as the client
            is_open = False
    assert not is_open
    return {**message, **delta["delta"], "usage": delta["usage"]}
