"""What the schema of a tool's arguments says that no grammar can hold, and what of it always can be. Pure.

A tool that is not `strict` is served whatever its schema says, as OpenAI and Anthropic do: the model is shown all of
it, and the answer is held to as much as a grammar can be.
"""

from __future__ import annotations

import re
from typing import Any

from gateway.grammars.schemas import JSON_STYLE, STYLE
from gateway.tools.xml_calls import raw_parameters

LOOSE_STYLE: dict[str, Any] = {**JSON_STYLE, "lenient": True}
"""How the grammar of a schema is made whose keywords need not all be held."""

NOT_HELD = frozenset(
    {
        "propertyNames", "not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems",
        "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems",
        "$dynamicRef", "$recursiveRef", "$recursiveAnchor",
    }
)  # fmt: skip
"""Keywords of JSON Schema that the compiler of grammars knows and cannot hold."""

FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid", "unknown"}
)
"""The values of `format` that it can."""

MAX_LOOKED_AT = 4096
"""Objects and lists in all schemas of a request that are looked into for such keywords: about a millisecond."""

_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_VALUES = frozenset({"const", "enum", "default", "example", "examples", "required"})  # their values are not schemas
_UNNAMABLE = re.compile(r"[>\n]")  # characters not allowed in tag names, see `xml_calls`


def not_held(schema: dict[str, Any], most: int) -> tuple[list[str], int]:
    """Return the keywords of a schema, and of those in it, that a grammar does not hold answers to, sorted.

    Beside them how many of its objects and lists were looked at, `most` at most: others are not searched.
    """
    found: set[str] = set()
    waiting: list[Any] = [schema]
    num = 0
    while waiting and num < most:
        part = waiting.pop()
        num += 1
        if isinstance(part, list):
            waiting += [one for one in part if isinstance(one, dict | list)]
            continue
        found |= part.keys() & NOT_HELD
        if isinstance(form := part.get("format"), str) and form not in FORMATS:
            found.add("format")
        for key, value in part.items():
            if key in _BY_NAME and isinstance(value, dict):
                waiting += [one for one in value.values() if isinstance(one, dict | list)]
            elif key not in _VALUES and key not in NOT_HELD and isinstance(value, dict | list):
                waiting.append(value)
    return sorted(found), num


def outline(schema: dict[str, Any]) -> dict[str, Any]:
    """Return of a schema what a grammar can always hold: the names of arguments, and which of them are strings."""
    given, names = schema.get("properties"), schema.get("required")
    raw = raw_parameters(schema)
    needed = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    known = dict.fromkeys([*(given if isinstance(given, dict) else ()), *needed])
    properties = {name: {"type": "string"} if name in raw else {} for name in known if not _UNNAMABLE.search(name)}
    closing = {"additionalProperties": False} if properties else {}
    required = list(dict.fromkeys(name for name in needed if name in properties))
    return {"type": "object", "properties": properties, "required": required, **closing, STYLE: dict(LOOSE_STYLE)}
