"""Infers from a chat template's syntax which form of messages it expects, and converts messages to it. Pure.

Templates agree on `role` and `content`, and on little else. Some expect content as a text, some iterate over its parts.
Missing content is None for one, while a missing key breaks another. One writes the arguments of calls as JSON and
expects an object, another concatenates them and expects JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from jinja2 import nodes

from gateway.chat.message_text import Message, text_of

_WRITTEN_OUT = ("tojson", "items", "dictsort", "string")
"""Filters of objects; if applied to the arguments of calls, the template expects an object."""


MAX_LOOKED_FOR = 32
"""Maximum messages searched for in a rendered text, each in all of it; no conversation may have more roles than half as
many."""


@dataclass(frozen=True, slots=True)
class Form:
    """The form of messages that a template expects."""

    parts: bool = False  # `content` may be a list
    only_parts: bool = False  # `content` must be a list
    no_content: str | None = ""  # content of a message without any
    calls_alone: bool = False  # calls are rendered only in messages without content
    json_arguments: bool = False  # arguments of calls are JSON texts, not objects
    developer: bool = False  # the role `developer` stays; otherwise it becomes `system`
    tool_names: bool = False  # a tool's message includes the tool's name


def form_of_template(tree: nodes.Template) -> Form:
    """Return the form that a template most likely expects."""
    content, arguments = _aliases(tree, "content"), _aliases(tree, "arguments")
    tests = list(tree.find_all(nodes.Test))
    walks = any(_is(loop.iter, "content", content) for loop in tree.find_all(nodes.For))
    return Form(
        parts=walks,
        only_parts=walks and not any(test.name in ("string", "iterable", "sequence", "mapping") for test in tests),
        no_content=None if any(t.name == "none" and _is(t.node, "content", content) for t in tests) else "",
        json_arguments=_wants_json(tree, arguments),
        calls_alone=_writes_calls_alone(tree, content),
        developer=any(const.value == "developer" for const in tree.find_all(nodes.Const)),
    )


def in_forms(messages: list[Message], form: Form) -> Iterator[list[Message]]:
    """Yield normalized messages in the given form, then in alternative forms, for templates that fail on it."""
    fallback = replace(form, tool_names=True)
    seen: list[list[Message]] = []
    for one in (
        form,
        fallback,
        replace(fallback, no_content=None if form.no_content == "" else ""),
        replace(fallback, json_arguments=not form.json_arguments),
        replace(fallback, parts=False, only_parts=False),
    ):
        made = _in_form(messages, one)
        if made not in seen:
            seen.append(made)
            yield made


def shows_lists(text: str, messages: list[Message]) -> bool:
    """Return whether a rendered text contains a list of parts as Python's repr instead of their text.

    A template treats messages of a role alike, except the first and the last, so only these are searched for.
    """
    lists = [message for message in messages if isinstance(message["content"], list) and message["content"]]
    firsts, lasts = ({message["role"]: message for message in some} for some in (reversed(lists), lists))
    asked = {id(message): message for message in (*firsts.values(), *lasts.values())}
    return any(str(message["content"]) in text for message in islice(asked.values(), MAX_LOOKED_FOR))


def _in_form(messages: list[Message], form: Form) -> list[Message]:
    names: dict[str, str] = {}  # names of the calls so far, by id
    made: list[Message] = []
    for message in messages:
        one = {**message, "content": _content(message, form)}
        role, calls = message["role"], message.get("tool_calls", ())
        if role == "developer" and not form.developer:
            one["role"] = "system"
        if form.json_arguments and calls:
            one["tool_calls"] = [_with_json(call) for call in calls]
        if form.calls_alone and calls and message.get("content"):
            made.append({key: value for key, value in one.items() if key != "tool_calls"})
            one = {"role": role, "content": form.no_content, "tool_calls": one["tool_calls"]}
        names |= {call["id"]: call["function"]["name"] for call in calls if "id" in call}
        if form.tool_names and role == "tool":
            id_ = message.get("tool_call_id", "")
            one.setdefault("name", names.get(id_, id_))
        made.append(one)
    return made


def _content(message: Message, form: Form) -> Any:
    content = message.get("content")
    if content is None or (not content and "tool_calls" in message):
        return form.no_content
    if isinstance(content, list):
        return [dict(part) for part in content] if form.parts else text_of(content)
    return [{"type": "text", "text": content}] if form.only_parts else content


def _with_json(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


# ---------------------------------------------------------------- syntax


def _aliases(tree: nodes.Template, key: str) -> set[str]:
    """Return the variables that are assigned `….key`, and macro parameters named after it."""
    found = {key}
    for macro in tree.find_all(nodes.Macro):
        found |= {arg.name for arg in macro.args if key in arg.name}
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and _is(assign.node, key, found):
            found.add(assign.target.name)
    return found


def _is(node: nodes.Node, key: str, aliases: set[str]) -> bool:
    """Return whether an expression is `….key`, or one of its aliases."""
    if isinstance(node, nodes.Getattr):
        return node.attr == key
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == key
    return isinstance(node, nodes.Name) and node.name in aliases


def _writes_calls_alone(tree: nodes.Template, aliases: set[str]) -> bool:
    """Return whether all loops over calls are conditional on absent content."""
    guarded: set[int] = set()
    for branch in tree.find_all(nodes.If):
        tests = branch.test.find_all(nodes.Test) if not isinstance(branch.test, nodes.Test) else [branch.test]
        negated = {id(n.node) for n in branch.test.find_all(nodes.Not)}
        if any(t.name == "none" and id(t) not in negated and _is(t.node, "content", aliases) for t in tests):
            guarded |= {id(loop) for part in branch.body for loop in (part, *part.find_all(nodes.For))}
    loops = [loop for loop in tree.find_all(nodes.For) if _is(loop.iter, "tool_calls", set())]
    return bool(loops) and all(id(loop) in guarded for loop in loops)


def _wants_json(tree: nodes.Template, aliases: set[str]) -> bool:
    """Return whether arguments of calls are output unchanged, and nowhere treated as an object."""
    if any(_is(f.node, "arguments", aliases) for f in tree.find_all(nodes.Filter) if f.name in _WRITTEN_OUT and f.node):
        return False
    if any(_is(test.node, "arguments", aliases) for test in tree.find_all(nodes.Test) if test.name != "defined"):
        return False
    if any(_walks(loop.iter, aliases) for loop in tree.find_all(nodes.For)):
        return False
    written = (*tree.find_all(nodes.Output), *tree.find_all((nodes.Add, nodes.Concat)))
    return any(_is(part, "arguments", aliases) for node in written for part in node.iter_child_nodes())


def _walks(node: nodes.Node, aliases: set[str]) -> bool:
    """Return whether a loop iterates over arguments or their items."""
    if isinstance(node, nodes.Filter) and node.node is not None:
        return _walks(node.node, aliases)
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
        return _walks(node.node.node, aliases)
    return _is(node, "arguments", aliases)
