"""Items of the Responses API: validated, normalized to the form shown in lists, and converted to messages. Pure.

In this API a conversation is a list of items: messages, reasoning, function calls and their results are separate items.
`bodies/parameters.toml` has their fields.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from gateway.bodies import json_values
from gateway.bodies.json_slices import JsonText, RowSlices
from gateway.chat.message_text import Message
from gateway.chat.messages import stand_in, unread_parts
from gateway.http.list_page import list_page
from gateway.responses.tools import flat_name
from protocol.wire.brief import brief
from protocol.wire.errors import BadRequest

Item = dict[str, Any]

FIRST_OUTPUT = 0x8000
"""Number in the id of a response's first output item; input items have lower numbers."""

MAX_ID_CHARACTERS = 100

PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}
"""Type of an item -> prefix of its id."""

_ID = re.compile(r"(?:msg|rs|fc|fco)_([0-9a-f]{32})([0-9a-f]{4})")
_ROLES = ("user", "assistant", "system", "developer")
_TEXT_ONLY = "this model accepts text only"
_AT_OPENAI = "it belongs to a tool that runs at OpenAI"
_NOT_READ = {
    "compaction": "it is encrypted, and OpenAI alone can read it",
    "custom_tool_call": "tools are functions here",
    "custom_tool_call_output": "tools are functions here",
}
"""Type of an item that is not supported -> why."""

_PARTS_OF = {"user": ("input_text",), "assistant": ("output_text", "refusal", "input_text")}
_TEXT_OF = {
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "reasoning_text": "text",
    "summary_text": "text",
}
"""Type of a part -> its text field."""


class ItemReference(NamedTuple):
    """A reference to an item of an earlier response."""

    call: str  # the id of that response, without its prefix
    id: str


def item_id(kind: str, call: str, number: int) -> str:
    """Return the id of an item. call: id of its response, without prefix."""
    return f"{PREFIXES[kind]}_{call}{number:04x}"


def item_page(ids: Sequence[str], texts: Sequence[bytes], *, has_more: bool) -> dict[str, Any]:
    """Return a page of items, given as their ids and their JSON texts."""
    page = list_page([{"id": one} for one in ids], has_more=has_more)
    return page | {"data": RowSlices(lambda: map(JsonText, texts), at_once=1)}


def references(given: str | Sequence[Item] | None) -> Iterator[ItemReference]:
    """Yield the references to items of other responses. Raises BadRequest for an invalid id."""
    if given is None or isinstance(given, str):
        return
    for i, item in enumerate(given):
        if item.get("type") != "item_reference":
            continue
        found = _ID.fullmatch(item["id"]) if isinstance(item.get("id"), str) else None
        if found is None:
            text = f"input[{i}].id: {brief(item.get('id'))} is not the id of a stored item"
            raise BadRequest(text, param=f"input[{i}].id")
        yield ItemReference(found[1], found[0])


def items_of(
    given: str | Sequence[Item] | None,
    call: str,
    known: Mapping[str, Item],
    earlier: Sequence[Item] = (),
    *,
    renamed: bool = False,
    param: str = "input",
) -> list[Item]:
    """Return a body's items with ids. Raises BadRequest naming the place.

    call: id of the response, without prefix. known: referenced items by id. earlier: items before these; an id that
    occurs again is replaced by a new one. renamed: give all items new ids, because a conversation's ids are unique.
    param: name of the body's field.
    """
    if given is None:
        return []
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    made: list[Item] = []
    ids = {item["id"] for item in earlier}
    for i, one in enumerate(given):
        place, kind = f"{param}[{i}]", "message" if one.get("type") is None else one["type"]
        item = known[one["id"]] if kind == "item_reference" else _item(one, kind, place)
        own = one.get("id")
        is_own = isinstance(own, str) and 0 < len(own) <= MAX_ID_CHARACTERS and own not in ids and not renamed
        item = {"id": "", **item} | {"id": own if is_own else item_id(item["type"], call, len(earlier) + i)}
        ids.add(item["id"])
        made.append(item)
    return made


def _item(given: Item, kind: Any, place: str) -> Item:
    """Return a normalized item without its id."""
    if kind == "message":
        return _message(given, place)
    if kind == "function_call":
        arguments, is_cut = _string(given, "arguments", place), given.get("status") == "incomplete"
        if not is_cut:
            _check_object(arguments, f"{place}.arguments")
        texts = {name: _string(given, name, place) for name in ("call_id", "name")}
        if given.get("namespace") not in (None, ""):
            texts["namespace"] = _string(given, "namespace", place)
        return {"type": kind, **texts, "arguments": arguments, "status": "incomplete" if is_cut else "completed"}
    if kind == "function_call_output":
        output = given.get("output")
        if isinstance(output, list):
            output = [_with_stand_in(part) for part in output]
        if not isinstance(output, str):
            output = _parts(output, f"{place}.output", ("input_text",))
        return {"type": kind, "call_id": _string(given, "call_id", place), "output": output, "status": "completed"}
    if kind == "reasoning":
        summary = _parts(given.get("summary") or [], f"{place}.summary", ("summary_text",))
        content = _parts(given.get("content") or [], f"{place}.content", ("reasoning_text",))
        return {"type": kind, "summary": summary, "content": content}
    if not isinstance(kind, str):
        why = "the type of an item is a string"
    else:
        why = _NOT_READ.get(kind, _AT_OPENAI)
    raise BadRequest(f"{place}: items of type {brief(kind)} are not supported: {why}", param=f"{place}.type")


def unread_results(given: str | Sequence[Item] | None) -> Iterator[str]:
    """Yield the places of replaced parts in the function results of a valid input."""
    for i, item in enumerate(given) if isinstance(given, list) else ():
        if item.get("type") == "function_call_output":
            yield from unread_parts(item.get("output"), f"input[{i}].output")


def _with_stand_in(part: Any) -> Any:
    """Return a part of a result, replaced by a text if it is not text."""
    instead = stand_in(part.get("type")) if isinstance(part, dict) else None
    return part if instead is None else {"type": "input_text", "text": instead}


def _message(given: Item, place: str) -> Item:
    role, content = given.get("role"), given.get("content")
    if role not in _ROLES:
        text = f"{place}.role must be one of {', '.join(_ROLES)}, not {brief(role)}"
        raise BadRequest(text, param=f"{place}.role")
    allowed = _PARTS_OF.get(role, ("input_text",))
    if isinstance(content, str):
        content = [{"type": allowed[0], "text": content}]
    parts = _parts(content, f"{place}.content", allowed)
    for part in parts:
        if part["type"] == "output_text":  # form of the official client's types
            part |= {"annotations": [], "logprobs": []}
    return {"type": "message", "role": role, "status": "completed", "content": parts}


def _parts(content: Any, place: str, allowed: Sequence[str]) -> list[dict[str, Any]]:
    """Return a content as parts, all of which must be text. Raises BadRequest."""
    if not isinstance(content, list):
        raise BadRequest(f"{place} must be a string or a list of parts", param=place)
    made: list[dict[str, Any]] = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if not isinstance(part, dict) or not isinstance(kind, str) or kind not in allowed:
            why = f"{_TEXT_ONLY}; there may be {', '.join(allowed)} here"
            raise BadRequest(f"{place}[{i}]: parts of type {brief(kind)} are not supported: {why}", param=place)
        field = _TEXT_OF[kind]
        made.append({"type": kind, field: _string(part, field, f"{place}[{i}]")})
    return made


def _string(given: Mapping[str, Any], name: str, place: str) -> str:
    value = given.get(name)
    if not isinstance(value, str):
        raise BadRequest(f"{place}.{name} must be a string", param=f"{place}.{name}")
    return value


def _check_object(arguments: str, place: str) -> None:
    """Refuse arguments of a call that are not a JSON object. Raises BadRequest."""
    try:
        value = json_values.loads(arguments.encode() or b"{}", place)
    except BadRequest as error:
        raise BadRequest(error.message, param=place) from error
    except ValueError as error:
        raise BadRequest(f"{place} is not JSON: {error}", param=place) from error
    if not isinstance(value, dict):
        raise BadRequest(f"{place} must be an object, as JSON", param=place)


def is_object(arguments: str) -> bool:
    """Return whether a call's arguments are a JSON object. A limit of tokens or a stop string may cut them off."""
    try:
        _check_object(arguments, "arguments")
    except BadRequest:
        return False
    return True


# ---------------------------------------------------------------- messages


def messages_of(instructions: str | None, items: Sequence[Item]) -> list[Message]:
    """Return items as messages in OpenAI's form, without calls that were cut off and have no result.

    Raises BadRequest for calls without results, and results without calls.
    """
    made: list[Message] = []
    if instructions:
        made.append({"role": "system", "content": instructions})
    open_calls: dict[str, str] = {}  # id of a call without a result -> its function
    calls: set[str] = set()
    answered = {item["call_id"] for item in items if item["type"] == "function_call_output"}
    for item in items:
        if item["type"] == "function_call_output":
            if item["call_id"] not in calls:
                text = f"input: no call has the call_id {brief(item['call_id'])} that a function_call_output names"
                raise BadRequest(text, param="input")
            open_calls.pop(item["call_id"], None)
            output = item["output"]
            content = output if isinstance(output, str) else "\n".join(part["text"] for part in output)
            made.append({"role": "tool", "tool_call_id": item["call_id"], "content": content})
        elif item["type"] == "message" and item["role"] != "assistant":
            made.append({"role": item["role"], "content": _content(item["content"])})
        else:
            if not made or made[-1]["role"] != "assistant":
                made.append({"role": "assistant"})
            is_call = item["type"] == "function_call"
            if is_call and item.get("status") == "incomplete":
                if item["call_id"] not in answered:
                    continue
                if not is_object(item["arguments"]):
                    item = {**item, "arguments": "{}"}
            _add(made[-1], item)
            if is_call:
                open_calls[item["call_id"]] = item["name"]
                calls.add(item["call_id"])
    if open_calls:
        call_id, name = next(iter(open_calls.items()))
        text = f"input: no function_call_output has the result of the call {brief(call_id)} of {brief(name)}"
        raise BadRequest(text, param="input")
    for message in made:
        for field in _JOINED:
            if isinstance(parts := message.get(field), list) and message["role"] == "assistant":
                message[field] = "".join(parts)
    return [
        {**message, "content": ""} if message.keys() <= {"role", "reasoning_content"} else message for message in made
    ]


def _content(parts: Sequence[Mapping[str, Any]]) -> str | list[dict[str, str]]:
    texts = [part[_TEXT_OF[part["type"]]] for part in parts]
    return texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts]


_JOINED = ("content", "reasoning_content")
"""Fields of an assistant message that join the texts of several items, collected in lists."""


def _add(message: Message, item: Item) -> None:
    """Add an item to the assistant message of its turn."""
    if item["type"] == "function_call":
        namespace = item.get("namespace")
        name = flat_name(namespace, item["name"]) if namespace else item["name"]
        function = {"name": name, "arguments": item["arguments"] or "{}"}
        call = {"id": item["call_id"], "type": "function", "function": function}
        message.setdefault("tool_calls", []).append(call)
        return
    kind: Literal["content", "summary"] = "content" if item["content"] or item["type"] == "message" else "summary"
    field = _JOINED[item["type"] != "message"]
    message.setdefault(field, []).extend(part[_TEXT_OF[part["type"]]] for part in item[kind])
