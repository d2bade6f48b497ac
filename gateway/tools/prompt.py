"""Tools as prompt text in the wording of Hermes and Qwen, for chat templates that do not know tools. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import re2 as _re2  # pyright: ignore[reportMissingTypeStubs]

from gateway.chat.message_text import Message, text_of

re2: Any = _re2  # untyped; on an untrusted template, `re` might backtrack for minutes
_TAG = re2.compile(r"(?s)\{[%{].*?[%}]\}")
_QUOTED = re2.compile(r"""(?s)'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""")
_VARIABLE = re2.compile(r"\btools\b")

_INTRODUCTION = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


@lru_cache(maxsize=64)
def knows_tools(template: str) -> bool:
    """Return whether a chat template, given as source, writes tools into prompts."""
    return any("tools" in tag and _VARIABLE.search(_QUOTED.sub("", tag)) for tag in _TAG.findall(template))


def explain_tools(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[Message]:
    """Return normalized messages, without calls, with an explanation of the tools in the first."""
    introduction = _INTRODUCTION.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if messages[0]["role"] in ("system", "developer"):
        first = {**messages[0], "content": f"{text_of(messages[0]['content'])}\n\n{introduction}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": introduction}, *messages]


def without_calls(messages: Sequence[Message]) -> list[Message]:
    """Return normalized messages with calls and their results converted to text."""
    return [_plain(message) for message in messages]


def _plain(message: Message) -> Message:
    text = text_of(message.get("content"))
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{text}\n</tool_response>"}
    if "tool_calls" not in message:
        return message
    calls = [
        "<tool_call>\n"
        + json.dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)
        + "\n</tool_call>"
        for function in (call["function"] for call in message["tool_calls"])
    ]
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": "\n".join([*([text] if text else []), *calls])}
