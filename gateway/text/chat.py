"""Chat templates: the model's Jinja template over the client's messages, in a sandbox, as transformers renders it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gateway.http import json_values
from peft_adapters.texts.files import TEXT_FILES, special_tokens, template_of
from protocol.wire.errors import BadRequest

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_LONG_NUMBER = re.compile(r"\d{19}")
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A compiled chat template with the model's special tokens. Raises BadRequest when it does not compile."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise BadRequest(f"the model's chat template is broken: {error}") from error
        self._special_tokens = special_tokens
        self.source = source

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """Read the template of a model folder; None when the model has none."""
        return cls.of({name: (folder / name).read_text() for name in TEXT_FILES if (folder / name).is_file()})

    @classmethod
    def of(cls, texts: Mapping[str, str]) -> ChatTemplate | None:
        """Return the template among a model's text files; None when there is none."""
        source = template_of(texts)
        return None if source is None else cls(source, special_tokens(texts))

    def render(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True, variables: dict[str, Any]
    ) -> str:
        """Return the prompt of normalized messages. Raises BadRequest with the template's own words."""
        try:
            return self._template.render(
                **{
                    "tools": None,
                    "documents": None,
                    **self._special_tokens,
                    **variables,
                    "messages": messages,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            message = f"the model's chat template refuses these messages: {error}"
            raise BadRequest(message, param="messages") from error


def normalize_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Check messages and bring them into the form that templates expect. Raises BadRequest naming the place.

    Lists of text parts become one text, `developer` becomes `system`, tool arguments become objects, absent values go.
    """
    return [_normalize(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _normalize(message: dict[str, Any], place: str) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        text = f"{place}.role must be one of {', '.join(sorted(ROLES))}, not {role!r:.100}"
        raise BadRequest(text, param=f"{place}.role")
    if message.get("content") is None and role != "assistant":
        raise BadRequest(f"{place}.content is missing", param=f"{place}.content")
    normal = {key: value for key, value in message.items() if value is not None}
    if role == "developer":
        normal["role"] = "system"
    if "content" in normal:
        normal["content"] = _text_of(normal["content"], f"{place}.content")
    if "tool_calls" in normal:
        normal["tool_calls"] = _tool_calls(normal["tool_calls"], f"{place}.tool_calls")
    reasoning = next((normal[field] for field in _REASONING_FIELDS if field in normal), None)
    if reasoning is not None:
        normal = {"thinking": reasoning, **normal, "reasoning_content": reasoning}
    return normal


def _text_of(content: object, place: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequest(f"{place} must be a string or a list of parts", param=place)
    texts: list[str] = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in ("text", "refusal"):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise BadRequest(f"{place}[{i}]: parts of type {kind!r:.100} are not supported", param=f"{place}[{i}]")
        text = part.get(part["type"])
        if not isinstance(text, str):
            raise BadRequest(f"{place}[{i}].{part['type']} must be a string", param=f"{place}[{i}]")
        texts.append(text)
    return "\n".join(texts)


def _tool_calls(calls: object, place: str) -> list[dict[str, Any]]:
    """Return tool calls with their arguments as objects: the API sends JSON text, templates expect what it means."""
    if not isinstance(calls, list):
        raise BadRequest(f"{place} must be a list", param=place)
    normal: list[dict[str, Any]] = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise BadRequest(f"{place}[{i}].function must be an object", param=f"{place}[{i}].function")
        arguments, where = function.get("arguments"), f"{place}[{i}].function.arguments"
        if isinstance(arguments, str):
            arguments = _parsed(arguments, where)
        normal.append({**call, "function": {**function, "arguments": arguments}})
    return normal


def _parsed(text: str, place: str) -> Any:
    """Return what a tool call's arguments mean, {} for none, with integers as they are. Raises BadRequest."""
    try:
        value = json_values.loads(text.encode(), place) if text else {}
        # orjson makes floats of integers beyond 64 bits.
        return json.loads(text) if _LONG_NUMBER.search(text) else value
    except BadRequest as error:
        raise BadRequest(error.message, param=place) from error
    except ValueError as error:
        raise BadRequest(f"{place} is not JSON: {error}", param=place) from error


# ---------------------------------------------------------------- the sandbox


class _GenerationBlocks(jinja2.ext.Extension):
    """Accepts `{% generation %}` blocks, which mark the assistant's text for training: here they are plain text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which a prompt must not be.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment
