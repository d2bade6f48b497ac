"""How this server handles every parameter that a supported API documents; the list is `parameters.toml`.

Each parameter is *served* (a field of the body declares it), *accepted* without effect, or *refused* with a 400 that
explains why. Others are unknown, and refused too (`parameter_check.py`). Every field of a body must have a row;
`tests/gateway/bodies/test_parameters.py` checks that. `python -m gateway.bodies.compat` writes the list's table into
`docs/compat.md`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import msgspec

LIST = Path(__file__).with_suffix(".toml")

SERVERS: Mapping[str, str] = MappingProxyType({
    "openai": "OpenAI", "vllm": "vLLM", "sglang": "SGLang", "tgi": "TGI", "lorax": "LoRAX", "ollama": "Ollama",
    "cohere": "Cohere", "jina": "Jina", "anthropic": "Anthropic",
})  # fmt: skip
"""Key of a server in the list -> its display name."""

_PARTS = {
    "block": ("text", "thinking", "tool_use", "tool_result"),
    "item": ("message", "reasoning", "function_call", "function_call_output", "item_reference"),
    "part": ("input_text", "output_text", "refusal", "reasoning_text", "summary_text"),
}
_OBJECTS_OF = {suffix: {kind: f"{kind}_{suffix}" for kind in kinds} for suffix, kinds in _PARTS.items()}

CLIENT_TOOL_TYPES = (
    "bash_20241022",
    "bash_20250124",
    "memory_20250818",
    "text_editor_20241022",
    "text_editor_20250124",
    "text_editor_20250429",
    "text_editor_20250728",
)
"""Types of Anthropic's tools that clients run; `anthropic/client_tools.py` has their parameters."""

BY_TYPE: Mapping[str, Mapping[str | None, str]] = MappingProxyType(
    {
        "block": _OBJECTS_OF["block"],
        "input_item": {None: "message_item", **_OBJECTS_OF["item"]},
        "input_part": _OBJECTS_OF["part"],
        "response_any_tool": {"function": "response_tool", "namespace": "response_namespace"},
        "response_function": {"function": "response_tool"},
        "any_tool": dict.fromkeys((None, "custom", *CLIENT_TOOL_TYPES), "messages_tool"),
    }
)
"""Kind of an object with a `type` -> each served type -> its name in `OBJECTS`. *Parse* refuses other types, with
reasons."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of one or more objects."""

    name: str
    objects: Sequence[str]  # names in `OBJECTS` that have this field
    servers: frozenset[str]  # servers that know it; empty: only this project
    fate: Literal["served", "accepted", "refused"]
    why: str  # why it has no effect, or is refused: a sentence without its subject, the parameter
    neutral: Sequence[Any]  # values with which a refused parameter is accepted, having no effect; null always is
    holds: str  # type of the value or of each list entry: a name in `OBJECTS` or `BY_TYPE`

    def has_effect(self, value: Any) -> bool:
        """Return whether a refused parameter would change anything at this value."""
        return self.fate == "refused" and value is not None and value not in self.neutral


class _Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    servers: str
    accepted: str = ""
    refused: str = ""
    neutral: tuple[Any, ...] = ()
    holds: str = ""


class _List(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    objects: dict[str, str]
    reasons: dict[str, str]
    parameters: dict[str, dict[str, str | _Row]]  # names of objects -> names of parameters -> servers, or a full row


def _read() -> tuple[Mapping[str, str], Sequence[Parameter]]:
    """Return `OBJECTS` and `PARAMETERS`. Raises msgspec.ValidationError if the list's format is invalid."""
    known = msgspec.convert(tomllib.loads(LIST.read_text()), _List)
    found: list[Parameter] = []
    for objects, rows in known.parameters.items():
        for names, given in rows.items():
            row = _Row(given) if isinstance(given, str) else given
            fate = "refused" if row.refused else "accepted" if row.accepted else "served"
            why = known.reasons.get(row.refused, row.refused) or known.reasons.get(row.accepted, row.accepted)
            servers = frozenset(row.servers.split())
            for name in names.split():
                found.append(Parameter(name, objects.split(), servers, fate, why, row.neutral, row.holds))
    return MappingProxyType(known.objects), found


OBJECTS, PARAMETERS = _read()
"""The JSON objects whose fields are parameters -> where each occurs; and all parameters, in the list's order."""


def _by_object() -> dict[str, dict[str, Parameter]]:
    found: dict[str, dict[str, Parameter]] = {name: {} for name in OBJECTS}
    for parameter in PARAMETERS:
        for name in parameter.objects:
            found[name][parameter.name] = parameter
    return found


PARAMETERS_OF: Mapping[str, Mapping[str, Parameter]] = _by_object()
"""Object -> its parameters by name."""
