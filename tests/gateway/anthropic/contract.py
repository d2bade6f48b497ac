"""Writes `contract.json`: JSON schemas of answers, from the types of the official client.

The client is not installed here: run this file with the Python of an environment that has `anthropic` (2.14).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("contract.json")
BLOCKS = {"TextBlock", "ThinkingBlock", "ToolUseBlock"}
DELTAS = {"TextDelta", "InputJSONDelta", "ThinkingDelta", "SignatureDelta"}
"""Members of the unions of content blocks and deltas to keep; answers never contain the others."""

NEVER = {
    "citations", "container", "diagnostics", "stop_details", "caller", "cache_creation", "server_tool_use",
    "output_tokens_details", "capabilities", "line",
}  # fmt: skip
"""Optional fields that answers never contain."""


def _bare(value: Any) -> Any:
    """Return a schema without titles, descriptions, and members of unions that answers never contain."""
    if isinstance(value, list):
        return [_bare(one) for one in value]
    if not isinstance(value, dict):
        return value
    dropped = {"title", "description", "discriminator", *NEVER}
    kept = {key: _bare(one) for key, one in value.items() if key not in dropped or isinstance(one, bool)}
    for key in ("oneOf", "anyOf"):
        refs = {one.get("$ref", "").rpartition("/")[2] for one in value.get(key, ()) if isinstance(one, dict)}
        wanted = next((kinds for kinds in (BLOCKS, DELTAS) if kinds & refs), refs)
        if key in kept:
            kept[key] = [one for one in kept[key] if "$ref" not in one or one["$ref"].rpartition("/")[2] in wanted]
    return kept


def _reachable(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema with only those definitions that it needs."""
    needed: dict[str, Any] = {}
    known = schema.get("$defs", {})
    todo = [{key: value for key, value in schema.items() if key != "$defs"}]
    while todo:
        one = todo.pop()
        for name in known:
            if name not in needed and f'"#/$defs/{name}"' in json.dumps(one):
                needed[name] = known[name]
                todo.append(known[name])
    return {**schema, "$defs": needed}


if __name__ == "__main__":
    import anthropic.types as answers  # pyright: ignore[reportMissingImports]
    import pydantic
    from anthropic.types.shared import ErrorResponse  # pyright: ignore[reportMissingImports]

    kinds = {
        "message": answers.Message, "event": answers.RawMessageStreamEvent, "error": ErrorResponse,
        "model": answers.ModelInfo, "count": answers.MessageTokensCount,
    }  # fmt: skip
    found = {name: _reachable(_bare(pydantic.TypeAdapter(kind).json_schema())) for name, kind in kinds.items()}
    lines = [f"{json.dumps(name)}: {json.dumps(found[name], sort_keys=True)}" for name in sorted(found)]
    FILE.write_text("{" + ",\n".join(lines) + "}\n")
