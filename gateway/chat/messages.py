"""Validates the messages of a chat in OpenAI's API, and normalizes them. Pure.

`template_forms` adapts the normal form to what a template expects.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from gateway.bodies import json_values
from gateway.chat.message_text import Message, text_of
from protocol.wire.brief import brief
from protocol.wire.errors import BadRequest

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})

MAX_OTHER_ROLES = 8
"""Maximum roles of a conversation besides these; some templates have their own."""

_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_LONG_NUMBER = re.compile(r"\d{19}")
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_STRINGS = ("name", "tool_call_id", *_REASONING_FIELDS)
_PART_TYPES = ("text", "refusal")
_RESULT_ROLES = ("tool", "function")

_UNREAD = {
    "image": "image", "image_url": "image", "input_image": "image", "document": "document", "file": "file",
    "input_file": "file", "input_audio": "sound", "audio": "sound",
}  # fmt: skip
"""Type of a part that is not text, in any API -> word for it in the text that replaces it."""


def normalize_messages(messages: list[Message]) -> list[Message]:
    """Return validated messages in the normal form. Raises BadRequest naming the place.

    `content` is a text or a list of text parts, and absent only from an assistant's message. Arguments of tool calls
    are objects. `function_call` and the role `function` become a tool call and its result, a refusal becomes text, and
    null fields are dropped.
    """
    normal: list[Message] = []
    call_id = ""  # id of the latest call
    for i, message in enumerate(messages):
        one = _normalize(message, f"messages[{i}]", new_id=f"{i:09}")  # as long as Mistral's templates demand
        if one["role"] == "function":
            one |= {"role": "tool", "tool_call_id": call_id}
        elif "tool_calls" in one:
            call_id = one["tool_calls"][-1].get("id", "")
        normal.append(one)
    return normal


def stand_in(kind: object) -> str | None:
    """Return the text that replaces a non-text part of a tool's result; None for types that are not replaced.

    The client did not choose what its tool returned, and a refusal would end its conversation: every later call would
    contain the same result.
    """
    word = _UNREAD.get(kind) if isinstance(kind, str) else None
    return f"[{word}: this model reads text]" if word is not None else None


def unread_parts(content: object, place: str) -> Iterator[str]:
    """Yield the places of replaced parts in a result's content, which may be invalid."""
    for i, part in enumerate(content) if isinstance(content, list) else ():
        if isinstance(part, dict) and stand_in(kind := part.get("type")) is not None:
            yield f"{place}[{i}] ({kind})"


def unread_results(messages: Sequence[Message]) -> Iterator[str]:
    """Yield the places of replaced parts in messages, which may be invalid."""
    for i, message in enumerate(messages):
        if message.get("role") in _RESULT_ROLES:
            yield from unread_parts(message.get("content"), f"messages[{i}].content")


def check_roles(messages: list[Message], text: str) -> None:
    """Raise BadRequest unless the rendered text contains all messages with non-standard roles.

    Some templates write any role, some have roles of their own, and some drop messages with unknown roles.
    """
    others = [message for message in messages if message["role"] not in ROLES]
    roles = {message["role"] for message in others}
    if len(roles) > MAX_OTHER_ROLES:
        told = f"messages has {len(roles)} roles besides {', '.join(sorted(ROLES))}"
        raise BadRequest(f"{told}; the limit is {MAX_OTHER_ROLES}", param="messages")
    missing = next((role for role in sorted(roles) if role not in text), None)
    at = 0  # each search starts after the previous match
    for message in others:
        content = text_of(message.get("content")).strip()
        found = text.find(content, at)
        if found < 0:
            missing = missing or message["role"]
            break
        at = found + len(content)
    if missing is not None:
        raise BadRequest(f"the template of this model has no role {missing!r}", param="messages")


def _normalize(message: Message, place: str, new_id: str) -> Message:
    role = message.get("role")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        text = f"{place}.role must be one of {', '.join(sorted(ROLES))}, or the template's own, not {brief(role)}"
        raise BadRequest(text, param=f"{place}.role")
    normal = {key: value for key, value in message.items() if value is not None}
    if "content" not in normal and role != "assistant":
        raise BadRequest(f"{place}.content is missing", param=f"{place}.content")
    for key in _STRINGS:
        if not isinstance(normal.get(key, ""), str):
            raise BadRequest(f"{place}.{key} must be a string", param=f"{place}.{key}")
    if "content" in normal:
        normal["content"] = _content(normal["content"], f"{place}.content", is_result=role in _RESULT_ROLES)
    if role == "assistant":
        _normalize_assistant(normal, place, new_id)
    elif normal.pop("tool_calls", []) != []:
        raise BadRequest(f"{place}.tool_calls: only the assistant calls tools", param=f"{place}.tool_calls")
    reasoning = next((normal[field] for field in _REASONING_FIELDS if field in normal), None)
    if reasoning is not None:
        normal = {"thinking": reasoning, **normal, "reasoning_content": reasoning}
    return normal


def _normalize_assistant(message: Message, place: str, new_id: str) -> None:
    """Normalize the fields that only assistant messages have. new_id: for a call without one."""
    if "audio" in message:
        raise BadRequest(f"{place}.audio is not supported: this model accepts text only", param=f"{place}.audio")
    refusal = message.pop("refusal", "")
    if not isinstance(refusal, str):
        raise BadRequest(f"{place}.refusal must be a string", param=f"{place}.refusal")
    if refusal:
        message["content"] = "\n".join(filter(None, [text_of(message.get("content")), refusal]))
    calls, where = message.pop("tool_calls", []), f"{place}.tool_calls"
    if not isinstance(calls, list):
        raise BadRequest(f"{where} must be a list", param=where)
    normal = [_tool_call(call, f"{where}[{i}]") for i, call in enumerate(calls)]
    if "function_call" in message:
        if calls:
            raise BadRequest(f"{place} has both tool_calls and function_call", param=f"{place}.function_call")
        function = _function(message.pop("function_call"), f"{place}.function_call")
        normal = [{"id": new_id, "type": "function", "function": function}]
    if normal:  # templates assume that a present list is not empty
        message["tool_calls"] = normal


def _tool_call(call: object, place: str) -> dict[str, Any]:
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        raise BadRequest(f"{place}.function must be an object", param=f"{place}.function")
    if not isinstance(call.get("id", ""), str):
        raise BadRequest(f"{place}.id must be a string", param=f"{place}.id")
    return {**call, "function": _function(call["function"], f"{place}.function")}


def _function(function: Any, place: str) -> dict[str, Any]:
    """Return a call's function with its arguments as an object; the API sends them as a JSON string."""
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRequest(f"{place}.name must be a string", param=f"{place}.name")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"{place}.arguments")
    if not isinstance(arguments, dict):
        raise BadRequest(f"{place}.arguments must be an object, as JSON", param=f"{place}.arguments")
    return {**function, "arguments": arguments}


def _content(content: object, place: str, *, is_result: bool) -> str | list[dict[str, str]]:
    """Return a message's content: a text, or a list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequest(f"{place} must be a string or a list of parts", param=place)
    return [{"type": "text", "text": _text(part, f"{place}[{i}]", is_result)} for i, part in enumerate(content)]


def _text(part: object, place: str, is_result: bool) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if is_result and isinstance(part, dict) and (instead := stand_in(kind)) is not None:
        return instead
    if not isinstance(part, dict) or kind not in _PART_TYPES:
        text = f"{place}: parts of type {brief(kind)} are not supported: this model accepts text only"
        raise BadRequest(text, param=place)
    text = part.get(kind)
    if not isinstance(text, str):
        raise BadRequest(f"{place}.{kind} must be a string", param=place)
    return text


def _parsed(text: str, place: str) -> Any:
    """Return a tool call's arguments, with exact integers. Raises BadRequest."""
    try:
        value = json_values.loads(text.encode(), place)
        # orjson converts integers beyond 64 bits to floats.
        return json.loads(text) if _LONG_NUMBER.search(text) else value
    except BadRequest as error:
        raise BadRequest(error.message, param=place) from error
    except ValueError as error:
        raise BadRequest(f"{place} is not JSON: {error}", param=place) from error
