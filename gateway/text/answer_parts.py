"""Splits a streamed chat answer into reasoning, text and tool calls. Pure.

A model's output is untrusted: the author of the prompt may control it. So the cost per character does not depend on the
preceding text. Text that may be the start of a call, or white space to be dropped before one, is held back up to a
limit, and long text is processed in pieces.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import re2 as _re2  # pyright: ignore[reportMissingTypeStubs]

from gateway.tools.styles import ToolStyle
from gateway.tools.xml_calls import XmlArguments
from protocol.wire.text import overlap

re2: Any = _re2  # untyped

Thought = tuple[str, str]
"""The marks before and after a model's reasoning."""

THOUGHTS: tuple[Thought, ...] = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
"""The marks of Qwen, DeepSeek and most others; of Mistral."""

MAX_HEAD = 1024
"""Maximum characters of a call before its arguments. Longer text is not a call."""

MAX_SPACE = 1024
"""Maximum white space dropped between text and the reasoning or call that follows."""

AT_ONCE = 1024
"""Characters processed at a time."""

_HEADS: dict[str, Any] = {  # style of the body -> pattern of a call's start; the group is its name
    "json": re2.compile(r'\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*\S'),
    "named": re2.compile(r"(?:\[TOOL_CALLS\])?\s*([\w-]+)(?:\[CALL_ID\][^\[]*)?\[ARGS\]\s*\S"),
}
_FUNCTION = "<function="
_IN_STRING, _BETWEEN = re.compile(r'["\\]'), re.compile(r'["{}\[\]]')  # they change the state of the scan


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an answer, or a piece of one. A call consists of a part with its name, then pieces of its arguments."""

    kind: Literal["text", "reasoning", "call", "arguments"]
    text: str  # for a call, its name
    index: int = 0  # index of the call


class ReasoningSplitter:
    """Separates reasoning between two marks, at the beginning of an answer, from the rest."""

    def __init__(self, thought: Thought, *, opened: bool) -> None:
        """Start a new answer. opened: the prompt ends within the reasoning."""
        self._begin, self._end = thought
        self._state: Literal["start", "inside", "gap", "after"] = "inside" if opened else "start"
        self._held = ""

    def add(self, text: str) -> list[Part]:
        """Add text; return the parts that are complete now."""
        self._held += text
        parts: list[Part] = []
        if self._state == "start":
            begun = self._held.lstrip()
            if begun.startswith(self._begin):
                self._state, self._held = "inside", begun.removeprefix(self._begin)
            elif not self._begin.startswith(begun) or len(self._held) - len(begun) > MAX_SPACE:
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
        """Return the text held back, at the end of the answer."""
        parts: list[Part] = []
        if self._state != "gap":
            _append(parts, "reasoning" if self._state == "inside" else "text", self._held)
        self._held = ""
        return parts


class CallSplitter:
    """Separates tool calls from the text before them. After the first call, other text is dropped."""

    def __init__(self, style: ToolStyle, raw: Mapping[str, Collection[str]]) -> None:
        """raw: tool -> its parameters whose values are raw text in tags, not JSON."""
        self._style = style
        self._raw_parameters = raw
        self._marker = style.marker
        self._state: Literal["start", "text", "head", "arguments", "plain", "over"] = (
            "text" if style.marker else "start"
        )
        self._held = ""
        self._raw: list[str] = []  # the first call's beginning, shown as text if it is incomplete
        self._scan: _ValueScan | XmlArguments = _ValueScan()
        self.num_calls = 0

    def add(self, text: str) -> list[Part]:
        """Add text; return the parts that are complete now."""
        self._held += text
        parts: list[Part] = []
        while self._advance(parts):
            pass
        return parts

    def _advance(self, parts: list[Part]) -> bool:
        """Parse one part of the held text; return whether another may follow."""
        if self._state == "start":
            begun = self._held.lstrip()
            is_long = len(self._held) - len(begun) > MAX_SPACE
            if begun or is_long:
                self._state = "head" if begun.startswith("{") and not is_long else "plain"
            return bool(begun) or is_long
        if self._state in ("plain", "over"):
            _append(parts, "text", self._held if self._state == "plain" else "")
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
        # White space before a call is not part of the text.
        keep = 0 if found else overlap(before, self._marker)
        shown = _without_space(before[: len(before) - keep])
        _append(parts, "text", shown)
        self._held = rest if found else before[len(shown) :]
        if found:
            self._state, self._raw = "head", [before[len(shown) :], found]
        return bool(found)

    def _head(self, parts: list[Part]) -> bool:
        in_tags = self._style.body == "xml"
        found = self._function() if in_tags else self._named()
        if found is None:
            if in_tags or len(self._held) <= MAX_HEAD:
                return False
            if self.num_calls:
                self._state = "over"
            else:
                self._state, self._held = "plain", "".join([*self._raw, self._held])
            return True
        name, end = found
        parts.append(Part("call", name, self.num_calls))
        self.num_calls += 1
        self._state, self._held = "arguments", self._held[end:]
        self._raw.clear()
        self._scan = XmlArguments(self._raw_parameters.get(name, ())) if in_tags else _ValueScan()
        return True

    def _named(self) -> tuple[str, int] | None:
        """Return the name of the call that begins the held text, and where its arguments begin; None if incomplete."""
        held = self._held
        begins = held.find("{") if self._style.body == "json" else len(held) - len(held.lstrip())
        self._skip(begins if begins >= 0 else len(held))
        head = _HEADS[self._style.body].match(self._held[:MAX_HEAD])
        return None if head is None else (head[1], head.end() - 1)

    def _function(self) -> tuple[str, int] | None:
        """Return the same for the first call in tags within the held text."""
        while True:
            begins = self._held.find(_FUNCTION)
            if begins < 0:
                self._skip(len(self._held) - overlap(self._held, _FUNCTION))
                return None
            self._skip(begins)
            name, closed, rest = self._held[len(_FUNCTION) : MAX_HEAD].partition(">")
            is_name = bool(name or not closed) and "\n" not in name
            if is_name and closed and rest.startswith("\n"):
                return name, len(_FUNCTION) + len(name) + 2
            if is_name and not rest and len(self._held) < MAX_HEAD:
                return None  # it may be incomplete
            self._skip(len(_FUNCTION))

    def _skip(self, num: int) -> None:
        """Drop the beginning of the held text, which is not part of a call."""
        if num and not self.num_calls:
            self._raw.append(self._held[:num])
        self._held = self._held[num:]

    def _arguments(self, parts: list[Part]) -> bool:
        arguments, self._held = self._scan.take(self._held)
        _append(parts, "arguments", arguments, self.num_calls - 1)
        if self._scan.ended:
            self._state = "head"
        return self._scan.ended

    def finish(self) -> list[Part]:
        """Return the text held back, at the end of the answer."""
        parts: list[Part] = []
        if self._state in ("start", "text", "plain"):
            _append(parts, "text", self._held)
        elif self._state == "head" and not self.num_calls:
            _append(parts, "text", "".join([*self._raw, self._held]))
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
        """Split the next text into the part that belongs to the object and the rest."""
        at = int(self._escaped and bool(text))
        self._escaped = self._escaped and not text
        while (found := (_IN_STRING if self._in_string else _BETWEEN).search(text, at)) is not None:
            character, at = found[0], found.end()
            if character == '"':
                self._in_string = not self._in_string
            elif character == "\\":
                self._escaped = at == len(text)
                at += 1
            elif character in "{[":
                self._depth += 1
            else:
                self._depth -= 1
                if not self._depth:
                    self.ended = True
                    return text[:at], text[at:]
        return text, ""


def _without_space(text: str) -> str:
    """Return a text without trailing white space, of which at most `MAX_SPACE` characters are dropped."""
    return text[: max(len(text.rstrip()), len(text) - MAX_SPACE)]


def _append(parts: list[Part], kind: Literal["text", "reasoning", "arguments"], text: str, index: int = 0) -> None:
    if text:
        parts.append(Part(kind, text, index))


class AnswerParts:
    """Splits one answer into the parts that its request and the model's template allow."""

    def __init__(
        self,
        *,
        thought: Thought | None,
        opened: bool,
        style: ToolStyle | None,
        raw: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        """thought: marks of reasoning, if any; opened: the prompt ends within it; style: of calls, if allowed.

        raw: tool -> its parameters whose values are raw text in tags, not JSON.
        """
        self._reasoning = ReasoningSplitter(thought, opened=opened) if thought is not None else None
        self._calls = CallSplitter(style, raw or {}) if style is not None else None

    @property
    def num_calls(self) -> int:
        """Number of calls begun so far."""
        return self._calls.num_calls if self._calls is not None else 0

    def add(self, text: str) -> list[Part]:
        """Add text; return the parts that are complete now."""
        if len(text) <= AT_ONCE:
            return self._add(text)
        return [part for at in range(0, len(text), AT_ONCE) for part in self._add(text[at : at + AT_ONCE])]

    def _add(self, text: str) -> list[Part]:
        parts = self._reasoning.add(text) if self._reasoning is not None else [Part("text", text)] if text else []
        return self._with_calls(parts)

    def finish(self) -> list[Part]:
        """Return the text held back, at the end of the answer."""
        parts = self._with_calls(self._reasoning.finish()) if self._reasoning is not None else []
        return parts + (self._calls.finish() if self._calls is not None else [])

    def _with_calls(self, parts: list[Part]) -> list[Part]:
        if self._calls is None:
            return parts
        calls = self._calls
        return [one for part in parts for one in (calls.add(part.text) if part.kind == "text" else [part])]
