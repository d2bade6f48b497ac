"""How models write tool calls. A model learns one style with its chat template, which reveals it. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

MarkerId = Callable[[str], int | None]
"""Returns the id of a marker that is a single added token; None for other texts."""


@dataclass(frozen=True, slots=True)
class ToolStyle:
    """How calls are written: prefix; each call as open, body, close; `between` between calls; suffix."""

    marker: str  # text with which only calls begin; "": an answer with calls begins with one
    prefix: str
    open: str
    close: str
    between: str
    suffix: str
    arguments: str = ""  # the key of the arguments, in bodies {"name": …, KEY: …}
    body: Literal["json", "named", "xml"] = "json"  # an object as above, NAME[ARGS]{…}, or tags, see xml_calls
    call_ids: bool = False  # named bodies are NAME[CALL_ID]…[ARGS]{…}
    id_characters: int = 24  # length of a call's id after "call_"; 9: without "call_", as Mistral's templates require


HERMES = ToolStyle("<tool_call>", "", "<tool_call>\n", "\n</tool_call>", "\n", "", "arguments")
LLAMA = ToolStyle("", "", "", "", "; ", "", "parameters")
MISTRAL = ToolStyle("[TOOL_CALLS]", "[TOOL_CALLS][", "", "", ", ", "]", "arguments", id_characters=9)
MISTRAL_SPACED = ToolStyle("[TOOL_CALLS]", "[TOOL_CALLS] [", "", "", ", ", "]", "arguments", id_characters=9)
MISTRAL_NAMED = ToolStyle("[TOOL_CALLS]", "", "[TOOL_CALLS]", "", "", "", body="named", id_characters=9)
MISTRAL_WITH_IDS = replace(MISTRAL_NAMED, call_ids=True)
QWEN_CODER = ToolStyle("<tool_call>", "", "<tool_call>\n", "\n</tool_call>", "\n", "", body="xml")


def style_of(template: str) -> ToolStyle:
    """Return the style of calls in a chat template, given as source; Hermes' style if it does not know tools."""
    if "[TOOL_CALLS]" in template and "[ARGS]" in template:
        return MISTRAL_WITH_IDS if "[CALL_ID]" in template else MISTRAL_NAMED
    if "[TOOL_CALLS]" in template:
        return MISTRAL_SPACED if "[TOOL_CALLS] [" in template else MISTRAL
    if "<function=" in template and "<parameter=" in template:
        return QWEN_CODER
    if "<tool_call>" in template:
        return HERMES
    if "<|python_tag|>" in template or ('"parameters": ' in template and "ipython" in template):
        return LLAMA
    return HERMES
