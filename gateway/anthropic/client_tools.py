"""Anthropic's tools that clients run and declare only by type, with their documented parameters.

Anthropic's own models are trained on them; other models get a description, and calls are constrained by a schema, as
for any tool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

_STRING = {"type": "string"}
_LINE = {"type": "integer", "minimum": 0}

_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "path": {**_STRING, "description": "The file or directory."},
    "view_range": {
        "type": "array",
        "items": {"type": "integer"},
        "minItems": 2,
        "maxItems": 2,
        "description": "For view: the first and last line to show, from 1; -1 is the end of the file.",
    },
    "file_text": {**_STRING, "description": "For create: the content of the file."},
    "old_str": {
        **_STRING,
        "description": "For str_replace: the text to replace, exactly as in the file, where it must occur once.",
    },
    "new_str": {
        **_STRING,
        "description": "For str_replace: the replacement. For insert without insert_text: the text to insert.",
    },
    "insert_line": {**_LINE, "description": "For insert: the line after which to insert, 0 for the beginning."},
    "insert_text": {**_STRING, "description": "For insert: the text to insert."},
    "old_path": {**_STRING, "description": "For rename: the current path."},
    "new_path": {**_STRING, "description": "For rename: the new path."},
}


def _commands(what: str, commands: Sequence[str], fields: Sequence[str], required: Sequence[str]) -> dict[str, Any]:
    """Return the definition of a tool whose argument `command` selects what it does."""
    command = {"type": "string", "enum": list(commands)}
    return {
        "description": f"{what} The argument command is one of {', '.join(commands)}.",
        "input_schema": {
            "type": "object",
            "properties": {"command": command, **{name: _FIELDS[name] for name in fields}},
            "required": ["command", *required],
            "additionalProperties": False,
        },
    }


_BASH = {
    "description": "Runs a command in a persistent bash session, and returns its output.",
    "input_schema": {
        "type": "object",
        "properties": {
            "command": {**_STRING, "description": "The command to run; not needed with restart."},
            "restart": {"type": "boolean", "description": "true starts a new session."},
        },
        "required": [],
        "additionalProperties": False,
    },
}
_EDITOR = "Views, creates and edits text files."
_EDITS = ("view", "create", "str_replace", "insert")
_EDITED = ("path", "view_range", "file_text", "old_str", "new_str", "insert_line", "insert_text")
_FIRST_EDITED = _EDITED[:-1]  # fields of the first editor, whose insert uses new_str

CLIENT_TOOLS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "bash_20241022": _BASH,
        "bash_20250124": _BASH,
        "text_editor_20241022": _commands(_EDITOR, (*_EDITS, "undo_edit"), _FIRST_EDITED, ["path"]),
        "text_editor_20250124": _commands(_EDITOR, (*_EDITS, "undo_edit"), _EDITED, ["path"]),
        "text_editor_20250429": _commands(_EDITOR, _EDITS, _EDITED, ["path"]),
        "text_editor_20250728": _commands(_EDITOR, _EDITS, _EDITED, ["path"]),
        "memory_20250818": _commands(
            "Stores files under /memories across conversations.",
            (*_EDITS, "delete", "rename"),
            (*_EDITED, "old_path", "new_path"),
            [],
        ),
    }
)
"""Type of a tool -> its description and `input_schema`."""
