"""What a client reads of the answers of OpenAI's routes, streamed or whole."""

from __future__ import annotations

import json
from typing import Any

import httpx2


def events_of(answer: httpx2.Response) -> list[Any]:
    """Return the chunks of a stream, or a whole answer as the only one. Raises AssertionError for an error."""
    assert answer.status_code == 200, answer.text
    if answer.headers["content-type"] == "application/json":
        return [answer.json()]
    return [json.loads(line[6:]) for line in answer.text.split("\n") if line.startswith("data: {")]


def text_of(events: list[Any]) -> str:
    """Return the text of all choices."""
    choices = [choice for event in events for choice in event["choices"]]
    parts = [choice.get("message") or choice.get("delta") or {"content": choice.get("text")} for choice in choices]
    return "".join(part.get("content") or "" for part in parts)
