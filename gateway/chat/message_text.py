"""The text of chat messages. Imports no libraries, because each sandbox process loads it at its start.

Pure.
"""

from __future__ import annotations

from typing import Any

Message = dict[str, Any]


def text_of(content: object) -> str:
    """Return the `content` of a normalized message as one text, "" if absent."""
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content)
    return content if isinstance(content, str) else ""


def text_in(message: Message) -> str:
    """Return the text of a message accepted by `normalize_messages`, ignoring tool calls."""
    content = message.get("content")
    refusal = (message.get("refusal") or "") if message["role"] == "assistant" else ""
    if isinstance(content, list):
        content = "\n".join(part[part["type"]] for part in content)
    return "\n".join(filter(None, [content, refusal])) if refusal else content or ""
