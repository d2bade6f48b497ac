"""Writes the shapes of what agents sent, as a tour left it: `python shapes.py build/tours/*/calls.json`.

A shape keeps every field, tool and schema. Texts are cut, and ids, paths and dates of the machine are replaced.
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


def shape_of(calls: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the shape of a tour's calls: the first with tools, what its last has besides, and those without tools."""
    sent = [call for call in calls if call["body"]]
    bodies = [short(json.loads(call["body"])) for call in sent]
    first, *_, last = [body for body in bodies if body.get("tools")]
    return {
        "path": sent[0]["path"],
        "headers": {name: value for name, value in sent[0]["headers"].items() if name in HEADERS},
        "probes": [f"{call['method']} {call['path']}" for call in calls if not call["body"]],
        "task": first,
        "result": {key: value for key, value in last.items() if value != first.get(key)},
        "asides": [body for body in bodies if not body.get("tools")],
    }


if __name__ == "__main__":
    for name in sys.argv[1:]:
        calls = Path(name)
        shape = shape_of(json.loads(calls.read_text()))
        file = Path(__file__).with_name(f"{calls.parent.name.replace('-', '_')}.json")
        file.write_text(json.dumps(shape, ensure_ascii=False, indent=1) + "\n")
