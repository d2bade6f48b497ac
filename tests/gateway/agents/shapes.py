"""Reduces the recorded calls of a tour to shapes: `python shapes.py build/tours/*/calls.json`.

A tour of a program written in Python records no calls; a proxy in front of the fleet then records them in the format of
`js/agents.mjs`. A shape keeps all fields, tools and schemas. Texts are shortened, the model is replaced with `base`,
and so are ids and paths of the machine with placeholders.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

MAX_TEXT = 48  # characters
HEADERS = {"accept", "anthropic-version", "anthropic-beta", "user-agent", "x-stainless-lang", "x-codex-beta-features"}
MACHINE = (
    (re.compile(r"/[^\s\"'\\]*/(?=(?:work|home)\b)"), "/"),
    (re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"), "00000000-0000-0000-0000-000000000000"),
    (re.compile(r"[0-9a-f]{32,}"), "0" * 32),
)
"""Patterns of text that identifies the machine of the agent, with their replacements."""


def short(value: Any) -> Any:
    """Return a JSON value with texts shortened, except regular expressions."""
    if isinstance(value, dict):
        return {key: one if key == "pattern" else short(one) for key, one in value.items()}
    if isinstance(value, list):
        return [short(one) for one in value]
    if not isinstance(value, str):
        return value
    for pattern, instead in MACHINE:
        value = pattern.sub(instead, value)
    return value if len(value) <= MAX_TEXT or value.startswith("{") else f"{value[:MAX_TEXT]}…"


def head_of(call: dict[str, Any]) -> dict[str, Any]:
    """Return the path of a call and those of its headers that a server may depend on."""
    return {
        "path": call["path"],
        "headers": {name: value for name, value in call["headers"].items() if name in HEADERS},
    }


def body_of(call: dict[str, Any]) -> dict[str, Any]:
    """Return the shape of a call's body."""
    return short(json.loads(call["body"])) | {"model": "base"}


def shape_of(calls: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the shape of a tour's calls: the first with tools, what the last adds to it, and calls without tools."""
    sent = [call for call in calls if call["body"] and call["status"] == 200]
    bodies = [body_of(call) for call in sent]
    first, *_, last = [body for body in bodies if body.get("tools")]
    return {
        **head_of(sent[0]),
        "probes": sorted({f"{call['method']} {call['path']}" for call in calls if not call["body"]}),
        "task": first,
        "result": {key: value for key, value in last.items() if key != "tools" and value != first.get(key)},
        "asides": [body for body in bodies if not body.get("tools")],
    }


def kinds_of(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one shape for each distinct path, client and set of fields, for programs that make many kinds of calls."""
    found = {}
    for call in calls:
        body = json.loads(call["body"])
        kind = (call["path"], call["headers"]["user-agent"].partition("/")[0], bool(body.get("stream")), *sorted(body))
        found.setdefault(kind, {**head_of(call), "body": body_of(call)})
    return list(found.values())


if __name__ == "__main__":
    for name in sys.argv[1:]:
        calls = Path(name)
        agent, sent = calls.parent.name.replace("-", "_"), json.loads(calls.read_text())
        shape = kinds_of(sent) if agent == "inspect_ai" else shape_of(sent)
        Path(__file__).with_name(f"{agent}.json").write_text(json.dumps(shape, ensure_ascii=False, indent=1) + "\n")
