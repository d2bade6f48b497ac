"""Splits a chat answer, which comes in pieces, into reasoning, text for the user, and tool calls. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from gateway.tools.styles import ToolStyle
from gateway.tools.xml_calls import XmlArguments
from protocol.wire.text import overlap

Thought = tuple[str, str]
"""The marks before and after a model's reasoning."""

THOUGHTS: tuple[Thought, ...] = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
"""The marks of Qwen, DeepSeek and most others; of Mistral."""

_HEADS = {  # how a call begins, by the way its body is written; the group is its name
    "json": re.compile(r'[^{]*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\S)'),
    "named": re.compile(r"\s*(?:\[TOOL_CALLS\])?\s*([\w-]+)(?:\[CALL_ID\][^\[]*)?\[ARGS\]\s*(?=\S)"),
    "xml": re.compile(r"(?s:.*?)<function=([^>\n]+)>\n"),
}


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an answer, or a piece of one. A call is its name, and the pieces of its arguments after it."""

    kind: Literal["text", "reasoning", "call", "arguments"]
    text: str  # of a call: its name
    index: int = 0  # of the call


class ReasoningSplitter:
    """Separates reasoning, which stands between two marks at the beginning, from what follows."""

    def __init__(self, thought: Thought, *, opened: bool) -> None:
        """Take `opened`: whether the prompt ends within the reasoning."""
        self._begin, self._end = thought
        self._state: Literal["start", "inside", "gap", "after"] = "inside" if opened else "start"
        self._held = ""

    def add(self, text: str) -> list[Part]:
        """Return the parts that a text completes."""
        self._held += text
        parts: list[Part] = []
        if self._state == "start":
            begun = self._held.lstrip()
            if begun.startswith(self._begin):
                self._state, self._held = "inside", begun.removeprefix(self._begin)
            elif not self._begin.startswith(begun):
                self._state = "after"
        if self._state == "inside":
            reasoning, found, rest = self._held.partition(self._end)
            keep = 0 if found else overlap(reasoning, self._end)
            self._held = rest if found else reasoning[len(reasoning) - keep :]
            _append(parts, "reasoning", reasoning[: len(reasoning) - keep])
            if found:
                self._state = "gap"
        if self._state == "gap":
            self._held = self._held.lstrip()
            if self._held:
                self._state = "after"
        if self._state == "after":
            _append(parts, "text", self._held)
            self._held = ""
        return parts

    def finish(self) -> list[Part]:
        """Return what was held back, once no more text comes."""
        parts: list[Part] = []
        if self._state != "gap":
            _append(parts, "reasoning" if self._state == "inside" else "text", self._held)
        self._held = ""
        return parts


class CallSplitter:
    """Separates tool calls from the text before them. Nothing but calls comes after the first."""

    def __init__(self, style: ToolStyle, raw: Mapping[str, Collection[str]]) -> None:
        """raw: of each tool, the parameters whose values stand in tags as they are."""
        self._style = style
        self._raw_parameters = raw
        self._marker = style.marker
        self._state: Literal["start", "text", "head", "arguments", "plain"] = "text" if style.marker else "start"
        self._held = ""
        self._raw = ""  # how the first call began, to be shown as text if it is cut off
        self._scan: _ValueScan | XmlArguments = _ValueScan()
        self.num_calls = 0

    def add(self, text: str) -> list[Part]:
        """Return the parts that a text completes."""
        self._held += text
        parts: list[Part] = []
        while self._advance(parts):
            pass
        return parts

    def _advance(self, parts: list[Part]) -> bool:
        """Read one part of the held text; return whether another may be read."""
        if self._state == "start":
            begun = self._held.lstrip()
            if begun:
                self._state = "head" if begun.startswith("{") else "plain"
            return bool(begun)
        if self._state == "plain":
            _append(parts, "text", self._held)
            self._held = ""
        elif self._state == "text":
            return self._text(parts)
        elif self._state == "head":
            return self._head(parts)
        else:
            return self._arguments(parts)
        return False

    def _text(self, parts: list[Part]) -> bool:
        before, found, rest = self._held.partition(self._marker)
        if found:
            _append(parts, "text", before.rstrip())
            self._state, self._held, self._raw = "head", rest, before[len(before.rstrip()) :] + found
            return True
        # White space before a call is no part of the text.
        keep = overlap(before, self._marker)
        shown = before[: len(before) - keep].rstrip()
        _append(parts, "text", shown)
        self._held = before[len(shown) :]
        return False

    def _head(self, parts: list[Part]) -> bool:
        head = _HEADS[self._style.body].match(self._held)
        if head is None:
            return False
        parts.append(Part("call", head[1], self.num_calls))
        self.num_calls += 1
        self._state, self._held = "arguments", self._held[head.end() :]
        in_tags = self._style.body == "xml"
        self._scan = XmlArguments(self._raw_parameters.get(head[1], ())) if in_tags else _ValueScan()
        return True

    def _arguments(self, parts: list[Part]) -> bool:
        arguments, self._held = self._scan.take(self._held)
        _append(parts, "arguments", arguments, self.num_calls - 1)
        if self._scan.ended:
            self._state = "head"
        return self._scan.ended

    def finish(self) -> list[Part]:
        """Return what was held back, once no more text comes."""
        parts: list[Part] = []
        if self._state in ("start", "text", "plain"):
            _append(parts, "text", self._held)
        elif self._state == "head" and not self.num_calls:
            _append(parts, "text", self._raw + self._held)
        self._held = ""
        return parts


class _ValueScan:
    """Finds the end of a JSON object."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.ended = False

    def take(self, text: str) -> tuple[str, str]:
        """Return how much of the next text belongs to the object, and the rest."""
        for i, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    self.ended = True
                    return text[: i + 1], text[i + 1 :]
        return text, ""


def _append(parts: list[Part], kind: Literal["text", "reasoning", "arguments"], text: str, index: int = 0) -> None:
    if text:
        parts.append(Part(kind, text, index))


class AnswerParts:
    """Splits one answer into the parts that its request and its model's template allow."""

    def __init__(
        self, *, thought: Thought | None, opened: bool, style: ToolStyle | None,
        raw: Mapping[str, Collection[str]] | None = None,
    ) -> None:  # fmt: skip
        """thought: the marks of reasoning, if any; opened: the prompt ends within it; style: of calls, if any may come.

        raw: of each tool, the parameters whose values stand in tags as they are.
        """
        self._reasoning = ReasoningSplitter(thought, opened=opened) if thought is not None else None
        self._calls = CallSplitter(style, raw or {}) if style is not None else None

    @property
    def num_calls(self) -> int:
        """Calls begun so far."""
        return self._calls.num_calls if self._calls is not None else 0

    def add(self, text: str) -> list[Part]:
        """Return the parts that a text completes."""
        parts = self._reasoning.add(text) if self._reasoning is not None else [Part("text", text)] if text else []
        return self._with_calls(parts)

    def finish(self) -> list[Part]:
        """Return what was held back, once no more text comes."""
        parts = self._with_calls(self._reasoning.finish()) if self._reasoning is not None else []
        return parts + (self._calls.finish() if self._calls is not None else [])

    def _with_calls(self, parts: list[Part]) -> list[Part]:
        if self._calls is None:
            return parts
        calls = self._calls
        return [one for part in parts for one in (calls.add(part.text) if part.kind == "text" else [part])]
