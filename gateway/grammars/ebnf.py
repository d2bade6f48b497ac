"""Converts grammars of SGLang, xgrammar and llama.cpp (GBNF) to llguidance's Lark. Pure."""

from __future__ import annotations

import json
import re

from gateway.grammars.notation import lark_string
from protocol.wire.errors import BadRequest

MAX_TOKENS = 10_000
"""Maximum tokens of a grammar, white space included: they take 20 ms of the event loop."""

_RULE = re.compile(r"(?m)^[ \t]*+[A-Za-z_][\w-]*+[ \t]*+::=")
_TOKEN = re.compile(
    r"""(?P<comment>\#[^\n]*+)|(?P<space>\s++)|(?P<string>"(?:[^"\\\n]|\\.)*+")"""
    r"""|(?P<class>\[\^?(?:[^\]\\\n]|\\.)*+\])"""
    r"""|(?P<rule>[A-Za-z_][\w-]*+)[ \t]*+::=|(?P<name>[A-Za-z_][\w-]*+)"""
    r"""|(?P<times>[*+?]|\{\s*+\d++\s*+(?:,\s*+\d*+\s*+)?\})|(?P<mark>[|()])|(?P<any>\.)|(?P<wrong>["\[{][^\n]*+)"""
)
_HEX = re.compile(r"\\x([0-9a-fA-F]{2})")
_WIDE = re.compile(r"\\U([0-9a-fA-F]{8})")
_IN_CLASS = re.compile(r"\\.|[/\[&~]", re.DOTALL)  # special in a class of Rust's regular expressions


def is_ebnf(text: str) -> bool:
    """Return whether a grammar uses `::=`, so that it is EBNF and not Lark."""
    return _RULE.search(text) is not None


def lark_of(text: str, place: str) -> str:
    """Convert an EBNF grammar with the start rule `root` to Lark. Raises BadRequest."""
    names: dict[str, str] = {"root": "start"}
    defined: set[str] = set()
    pieces: list[str] = []
    at, num_tokens = 0, 0
    while at < len(text):
        token = _TOKEN.match(text, at)
        num_tokens += 1
        if num_tokens > MAX_TOKENS:
            raise BadRequest(f"{place} has more than {MAX_TOKENS} parts, which is the limit", param=place)
        if token is None or token.lastgroup in (None, "wrong"):
            raise BadRequest(f"{place} is not valid EBNF at {text[at : at + 20]!r}", param=place)
        at, kind, found = token.end(), token.lastgroup, token[token.lastgroup or 0]
        if kind in ("rule", "name"):
            name = names.setdefault(found, f"rule_{len(names)}")
            if kind == "rule":
                if found in defined:
                    raise BadRequest(f"{place} defines the rule {found:.100} twice", param=place)
                defined.add(found)
            pieces.append(f"\n{name}:" if kind == "rule" else name)
        elif kind == "string":
            pieces.append(lark_string(_literal(found, place)))
        elif kind == "class":
            pieces.append(f"/[{_IN_CLASS.sub(_escaped, found[1:-1])}]/")
        elif kind == "any":
            pieces.append("/./")
        elif kind == "times" and pieces:
            pieces[-1] += "".join(found.split())
        elif kind == "mark":
            pieces.append(found)
    missing = next((name for name in names if name not in defined), None)
    if missing is not None:
        raise BadRequest(f"{place} has no rule {missing:.100}", param=place)
    return " ".join(pieces).strip()


def _literal(token: str, place: str) -> str:
    """Return the text of an EBNF string literal."""
    text = _WIDE.sub(lambda found: json.dumps(chr(min(int(found[1], 16), 0x10FFFF)))[1:-1], token)
    try:
        return json.loads(_HEX.sub(r"\\u00\1", text).replace("\\[", "[").replace("\\]", "]"), strict=False)
    except ValueError:
        raise BadRequest(f"{place} has a string with an invalid escape: {token:.60}", param=place) from None


def _escaped(found: re.Match[str]) -> str:
    return found[0] if len(found[0]) == 2 else f"\\{found[0]}"
