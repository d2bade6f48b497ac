"""Converts messages, system texts and tools of Anthropic's API to OpenAI's form, which chat templates use. Pure.

A message of Anthropic's is a list of blocks: tool calls are blocks of the assistant, their results blocks of the user,
and consecutive messages of a role are one turn. `bodies/parameters.toml` has the fields of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from gateway.anthropic.client_tools import CLIENT_TOOLS
from gateway.bodies.parameter_check import MAX_ENTRIES
from gateway.chat.message_text import Message
from gateway.chat.messages import stand_in, unread_parts
from gateway.grammars.limits import check_num
from gateway.tools.definitions import ToolWords
from protocol.wire.brief import brief
from protocol.wire.errors import BadRequest

WORDS = ToolWords(name=".name", schema=".input_schema", max_name=128)

ERROR = "Error: "
"""Prefix of the text of a result with `is_error`, for which templates have no mark."""

_BLOCKS_OF = {"user": ("text", "tool_result"), "assistant": ("text", "thinking", "tool_use"), "system": ("text",)}

_TEXT_ONLY = "this model accepts text only"
_AT_ANTHROPIC = "it belongs to a tool that runs at Anthropic"
_NOT_READ = {
    "image": _TEXT_ONLY,
    "document": _TEXT_ONLY,
    "search_result": _TEXT_ONLY,
    "redacted_thinking": "it is encrypted, and Anthropic alone can read it",
    "container_upload": _AT_ANTHROPIC,
    "server_tool_use": _AT_ANTHROPIC,
    "tool_reference": "it refers to a tool search, but all tools are given to the model here",
}
"""Type of a block that is not supported -> why."""

_HOSTED = ("web_search_", "web_fetch_", "code_execution_", "tool_search_tool_", "mcp_toolset", "advisor_")
"""Type prefixes of tools that Anthropic runs."""

_TRAINED_ON = ("bash_", "text_editor_", "computer_", "browser_", "memory_")
"""Type prefixes of tools that clients run and declare without parameters; `client_tools` has some of them."""


def messages_of(system: str | list[dict[str, Any]] | None, given: Sequence[dict[str, Any]]) -> list[Message]:
    """Return messages in OpenAI's form, preceded by the system text. Raises BadRequest naming the place."""
    made: list[Message] = []
    calls: set[str] = set()  # ids of the calls so far
    if system:
        _add(made, {"role": "system", "content": _texts(system, "system")})
    for i, message in enumerate(given):
        role, place = message.get("role"), f"messages[{i}].content"
        if not isinstance(role, str) or role not in _BLOCKS_OF:
            text = f"messages[{i}].role must be one of {', '.join(_BLOCKS_OF)}, not {brief(role)}"
            raise BadRequest(text, param=f"messages[{i}].role")
        content = message.get("content")
        if role == "user" and _has_results(content):
            content = [_with_stand_in(block) for block in content]
        blocks = _blocks(content, place, _BLOCKS_OF[role])
        if role == "assistant":
            _add(made, _of_assistant(blocks, place, calls))
            continue
        for one in _of_others(role, blocks, place, calls):
            _add(made, one)
    return [_plain(message) for message in made]


def unread_results(given: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the places of replaced parts in the tool results of valid messages."""
    for i, message in enumerate(given):
        content, place = message["content"], f"messages[{i}].content"
        if message["role"] != "user" or not _has_results(content):
            continue
        yield from unread_parts(content, place)
        for j, block in enumerate(content):
            if block["type"] == "tool_result":
                yield from unread_parts(block.get("content"), f"{place}[{j}].content")


def is_beyond(tool: Mapping[str, Any]) -> bool:
    """Return whether Anthropic runs a tool, or only its models know the tool's parameters."""
    kind = tool.get("type")
    return isinstance(kind, str) and kind.startswith((*_HOSTED, *_TRAINED_ON)) and kind not in CLIENT_TOOLS


def definition_of(tool: dict[str, Any], place: str) -> dict[str, Any]:
    """Return a tool in OpenAI's form. Raises BadRequest for an unsupported tool."""
    kind = tool.get("type")
    if isinstance(kind, str) and kind in CLIENT_TOOLS:
        tool = {**CLIENT_TOOLS[kind], **{name: value for name, value in tool.items() if value is not None}}
    elif kind is not None and kind != "custom":
        why = "it runs at Anthropic"
        if isinstance(kind, str) and kind.startswith(_TRAINED_ON):
            why = "only Anthropic's models are trained on its parameters: give a tool with a name and an input_schema"
        raise BadRequest(f"{place}: tools of type {brief(kind)} are not supported: {why}", param=f"{place}.type")
    for name, types in (("description", str), ("strict", bool)):
        if not isinstance(tool.get(name), types | None):
            what = "a string" if types is str else "true or false"
            raise BadRequest(f"{place}.{name} must be {what}", param=f"{place}.{name}")
    if tool.get("input_schema") is None:
        raise BadRequest(f"{place}.input_schema: it is missing", param=f"{place}.input_schema")
    function = {"name": tool.get("name"), "parameters": tool["input_schema"]}
    more = {name: tool[name] for name in ("description", "strict") if tool.get(name) is not None}
    return {"type": "function", "function": {**function, **more}}


# ---------------------------------------------------------------- blocks


def _blocks(content: Any, place: str, allowed: Sequence[str]) -> list[dict[str, Any]]:
    """Return a content as blocks of allowed types. Raises BadRequest."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise BadRequest(f"{place} must be a string or a list of blocks", param=place)
    check_num(len(content), MAX_ENTRIES, "blocks", place)
    for i, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else type(block).__name__
        if isinstance(kind, str) and kind in allowed and isinstance(block, dict):
            continue
        if not isinstance(kind, str):
            why = "the type of a block is a string"
        elif kind.endswith("_tool_result"):
            why = _AT_ANTHROPIC
        else:
            why = _NOT_READ.get(kind) or f"there may be {', '.join(allowed)} here"
        raise BadRequest(f"{place}[{i}]: blocks of type {brief(kind)} are not supported: {why}", param=f"{place}[{i}]")
    return content


def _texts(content: Any, place: str) -> list[dict[str, str]]:
    """Return a content as text parts. Raises BadRequest for other blocks."""
    return [_text(block, f"{place}[{i}]") for i, block in enumerate(_blocks(content, place, ("text",)))]


def _text(block: Mapping[str, Any], place: str) -> dict[str, str]:
    return {"type": "text", "text": _string(block, "text", place)}


def _string(block: Mapping[str, Any], name: str, place: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise BadRequest(f"{place}.{name} must be a string", param=f"{place}.{name}")
    return value


def _of_assistant(blocks: Sequence[dict[str, Any]], place: str, calls: set[str]) -> Message:
    message: Message = {"role": "assistant", "content": []}
    for i, block in enumerate(blocks):
        where = f"{place}[{i}]"
        if block["type"] == "text":
            message["content"].append(_text(block, where))
        elif block["type"] == "thinking":
            thinking = _string(block, "thinking", where)
            message.setdefault("reasoning_content", []).append(thinking)  # `_plain` joins them
        else:
            message.setdefault("tool_calls", []).append(_call(block, where))
            calls.add(block["id"])
    return message


def _call(block: Mapping[str, Any], place: str) -> dict[str, Any]:
    id_, name, given = _string(block, "id", place), _string(block, "name", place), block.get("input")
    if not isinstance(given, dict):
        raise BadRequest(f"{place}.input must be an object", param=f"{place}.input")
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": given}}


def _of_others(role: str, blocks: Sequence[dict[str, Any]], place: str, calls: set[str]) -> Iterator[Message]:
    """Yield the messages of a user or system: texts, and the results of calls between them."""
    if not blocks:
        raise BadRequest(f"{place} is empty", param=place)
    for i, block in enumerate(blocks):
        where = f"{place}[{i}]"
        if block["type"] == "text":
            yield {"role": role, "content": [_text(block, where)]}
        else:
            yield _result(block, where, calls)


def _result(block: Mapping[str, Any], place: str, calls: set[str]) -> Message:
    id_, content, is_error = _string(block, "tool_use_id", place), block.get("content"), block.get("is_error")
    if id_ not in calls:
        text = f"{place}.tool_use_id: {brief(id_)} is not the id of an earlier tool_use block"
        raise BadRequest(text, param=f"{place}.tool_use_id")
    if not isinstance(is_error, bool | None):
        raise BadRequest(f"{place}.is_error must be true or false", param=f"{place}.is_error")
    if isinstance(content, list):
        content = [_with_stand_in(block) for block in content]
    parts = _texts("" if content is None else content, f"{place}.content")
    if is_error and not (parts and parts[0]["text"].startswith("Error")):
        parts = [{"type": "text", "text": ERROR + (parts[0]["text"] if parts else "")}, *parts[1:]]
    return {"role": "tool", "tool_call_id": id_, "content": parts}


def _has_results(content: Any) -> TypeGuard[list[Any]]:
    """Return whether a user's content has tool results: then other blocks, such as a PDF, may belong to them."""
    return isinstance(content, list) and any(
        isinstance(block, dict) and block.get("type") == "tool_result" for block in content
    )


def _with_stand_in(block: Any) -> Any:
    """Return a block, replaced by a text if it is not text."""
    instead = stand_in(block.get("type")) if isinstance(block, dict) else None
    return block if instead is None else {"type": "text", "text": instead}


# ---------------------------------------------------------------- messages


def _add(made: list[Message], message: Message) -> None:
    """Append a message, or merge it into the last one if that has the same role."""
    last = made[-1] if made else None
    if last is None or last["role"] != message["role"] or message["role"] == "tool":
        made.append(message)
        return
    last["content"] += message["content"]
    if "tool_calls" in message:
        last.setdefault("tool_calls", []).extend(message["tool_calls"])
    if "reasoning_content" in message:
        last.setdefault("reasoning_content", []).extend(message["reasoning_content"])


def _plain(message: Message) -> Message:
    """Return a message with a single text part as a text, and without empty content besides calls."""
    content = message["content"]
    if "reasoning_content" in message:
        message = {**message, "reasoning_content": "".join(message["reasoning_content"])}
    if not content and "tool_calls" in message:
        return {key: value for key, value in message.items() if key != "content"}
    return {**message, "content": content if len(content) > 1 else content[0]["text"] if content else ""}
