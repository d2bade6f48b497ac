"""What a grammar can enforce of the schema of a tool's arguments. Pure.

A tool that is not `strict` is served whatever its schema contains, as OpenAI and Anthropic do: the model sees the whole
schema, and the answer is constrained as far as a grammar can.
"""

from __future__ import annotations

import re
from typing import Any

from gateway.grammars.schemas import JSON_STYLE, STYLE
from gateway.tools.xml_calls import raw_parameters

LOOSE_STYLE: dict[str, Any] = {**JSON_STYLE, "lenient": True}
"""Style of the grammar of a schema whose keywords need not all be enforced."""

NOT_HELD = frozenset(
    {
        "propertyNames", "not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems",
        "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems",
        "$dynamicRef", "$recursiveRef", "$recursiveAnchor",
    }
)  # fmt: skip
"""Keywords of JSON Schema that the grammar compiler knows but cannot enforce."""

FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid", "unknown"}
)
"""The values of `format` that it can enforce."""

MAX_LOOKED_AT = 4096
"""Maximum objects and lists, in all schemas of a request, searched for such keywords: about a millisecond."""

_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_VALUES = frozenset({"const", "enum", "default", "example", "examples", "required"})  # their values are not schemas
_UNNAMABLE = re.compile(r"[>\n]")  # characters not allowed in tag names, see `xml_calls`


def not_held(schema: dict[str, Any], most: int) -> tuple[list[str], int]:
    """Return the keywords in a schema and its subschemas that a grammar does not enforce, sorted.

    Also return how many objects and lists were searched; `most` is the maximum.
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
    """Return the part of a schema that a grammar can always enforce: the arguments' names, and which are strings."""
    given, names = schema.get("properties"), schema.get("required")
    raw = raw_parameters(schema)
    needed = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    known = dict.fromkeys([*(given if isinstance(given, dict) else ()), *needed])
    properties = {name: {"type": "string"} if name in raw else {} for name in known if not _UNNAMABLE.search(name)}
    closing = {"additionalProperties": False} if properties else {}
    required = list(dict.fromkeys(name for name in needed if name in properties))
    return {"type": "object", "properties": properties, "required": required, **closing, STYLE: dict(LOOSE_STYLE)}
