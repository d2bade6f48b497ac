"""Writes the shapes of what agents sent, as a tour left it: `python shapes.py build/tours/*/calls.json`.

Tours of programs in Python leave none: a proxy in front of the fleet notes theirs, in the form of `js/agents.mjs`. A
shape keeps every field, tool and schema. Texts are cut, the model is `base`, and ids and paths of the machine are
replaced.
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
"""What tells of the machine that the agent ran on, and what stands there instead."""


def short(value: Any) -> Any:
    """Return a value of JSON with short texts; regular expressions stay whole."""
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
    """Return a call's path, and those of its headers that may matter to a server."""
    return {
        "path": call["path"],
        "headers": {name: value for name, value in call["headers"].items() if name in HEADERS},
    }


def body_of(call: dict[str, Any]) -> dict[str, Any]:
    """Return the shape of a call's body."""
    return short(json.loads(call["body"])) | {"model": "base"}


def shape_of(calls: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the shape of a tour's calls: the first with tools, what its last has besides, and those without tools."""
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
    """Return the shapes of calls that differ in their paths or fields, for a program that has many kinds of them."""
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
