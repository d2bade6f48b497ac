"""Tools of Anthropic's that clients run and of which they send no more than a type: what Anthropic documents of each.

Its own models know them by heart; others are shown a description, and calls are held to a schema, as with any tool.
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
        "description": "Of view: the first and the last line to show, from 1; -1 is the last one of the file.",
    },
    "file_text": {**_STRING, "description": "Of create: what the file is to contain."},
    "old_str": {**_STRING, "description": "Of str_replace: the text to replace, exactly as it is in the file, once."},
    "new_str": {
        **_STRING,
        "description": "Of str_replace: the text in its place. Of an insert that has no other: the text.",
    },
    "insert_line": {**_LINE, "description": "Of insert: the line after which the text goes, 0 for the beginning."},
    "insert_text": {**_STRING, "description": "Of insert: the text."},
    "old_path": {**_STRING, "description": "Of rename: the path as it is."},
    "new_path": {**_STRING, "description": "Of rename: the path as it is to be."},
}


def _commands(what: str, commands: Sequence[str], fields: Sequence[str], required: Sequence[str]) -> dict[str, Any]:
    """Return the definition of a tool with an argument that says what it is to do."""
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
    "description": "Runs a command in a bash session that goes on between calls, and returns what it prints.",
    "input_schema": {
        "type": "object",
        "properties": {
            "command": {**_STRING, "description": "The command to run; not needed with restart."},
            "restart": {"type": "boolean", "description": "true begins a new session."},
        },
        "required": [],
        "additionalProperties": False,
    },
}
_EDITOR = "Shows, makes and edits files of text."
_EDITS = ("view", "create", "str_replace", "insert")
_EDITED = ("path", "view_range", "file_text", "old_str", "new_str", "insert_line", "insert_text")
_FIRST_EDITED = _EDITED[:-1]  # of the first editor, whose insert takes new_str

CLIENT_TOOLS: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "bash_20241022": _BASH,
    "bash_20250124": _BASH,
    "text_editor_20241022": _commands(_EDITOR, (*_EDITS, "undo_edit"), _FIRST_EDITED, ["path"]),
    "text_editor_20250124": _commands(_EDITOR, (*_EDITS, "undo_edit"), _EDITED, ["path"]),
    "text_editor_20250429": _commands(_EDITOR, _EDITS, _EDITED, ["path"]),
    "text_editor_20250728": _commands(_EDITOR, _EDITS, _EDITED, ["path"]),
    "memory_20250818": _commands(
        "Keeps files below /memories from one conversation to the next.",
        (*_EDITS, "delete", "rename"),
        (*_EDITED, "old_path", "new_path"),
        [],
    ),
})  # fmt: skip
"""Type of a tool -> its description and `input_schema`."""
