"""Grammars in llguidance's notation, and their wire form. Pure."""

from __future__ import annotations

import json
import re
from typing import Any

Constraint = dict[str, Any]
"""One entry of llguidance's list of grammars: {"json_schema": …} or {"lark_grammar": …}."""


def grammar_text(*constraints: Constraint) -> str:
    """Return grammars in their wire form: the output's, followed by those that it refers to by name."""
    return json.dumps({"grammars": constraints}, ensure_ascii=False, separators=(",", ":"))


def lark_string(text: str) -> str:
    """Return a text as a literal of llguidance's Lark."""
    return json.dumps(text, ensure_ascii=False)


def lark_json(schema: Any) -> str:
    """Return a JSON schema as an expression of llguidance's Lark."""
    return f"%json {json.dumps(schema, ensure_ascii=False)}"


def lark_regex(text: str) -> str:
    """Return a text as a part of a regular expression of llguidance's Lark."""
    return re.escape(text).replace("/", "\\/")


def regex_literal(pattern: str) -> str:
    """Return a regular expression as a literal of llguidance's Lark."""
    escaped, backslash = [], False
    for character in pattern:
        if character == "/" and not backslash:
            escaped.append("\\/")
        elif character == "\n":
            escaped.append("n" if backslash else "\\n")
        else:
            escaped.append(character)
        backslash = character == "\\" and not backslash
    return f"/{''.join(escaped)}/"
