"""Chat templates: renders messages with the model's Jinja template, in Jinja's sandbox, as transformers does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gateway.chat.message_text import Message
from gateway.chat.template_forms import form_of_template, in_forms, shows_lists
from peft_adapters.texts.files import TEXT_FILES, special_tokens, template_of
from protocol.wire.errors import BadRequest

END_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
"""Appended to a last message that is to be continued, to find its end in the rendered text. It is transformers' mark
plus a space, which shows whether the template strips the text."""

_FAILURES = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError, AttributeError)


class _RaisedError(jinja2.TemplateError):
    """The error of a template's `raise_exception`."""


class ChatTemplate:
    """A compiled chat template with the model's special tokens. Raises BadRequest if it does not compile."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self._form = form_of_template(environment.parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise BadRequest(f"the model's chat template is broken: {error}") from error
        self._special_tokens = special_tokens
        self.source = source

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """Read the template of a model folder; None if there is none."""
        return cls.of({name: (folder / name).read_text() for name in TEXT_FILES if (folder / name).is_file()})

    @classmethod
    def of(cls, texts: Mapping[str, str]) -> ChatTemplate | None:
        """Return the template among a model's text files; None if there is none."""
        source = template_of(texts)
        return None if source is None else cls(source, special_tokens(texts))

    def render(
        self,
        messages: list[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        variables: dict[str, Any],
    ) -> str:
        """Return the prompt of normalized messages. continue_final: end it after the text of the last one.

        Raises BadRequest, with the template's own message if it has one.
        """
        failure: Exception | None = None
        for form in in_forms(messages, self._form):
            shown = [*form[:-1], _marked(form[-1])] if continue_final else form
            try:
                text = self._render(shown, add_generation_prompt, variables)
            except (_RaisedError, SecurityError) as error:
                message = f"the model's chat template refuses these messages: {error}"
                raise BadRequest(message, param="messages") from error
            except _FAILURES as error:
                failure = failure or error
                continue
            if not shows_lists(text, shown):
                return _up_to_mark(text, form[-1]) if continue_final else text
        place = f" in line {_line(failure.__traceback__)} ({type(failure).__name__})" if failure is not None else ""
        raise BadRequest(f"the model's chat template fails on these messages{place}", param="messages") from failure

    def _render(self, messages: list[Message], add_generation_prompt: bool, variables: dict[str, Any]) -> str:
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


# ---------------------------------------------------------------- a message that is to be continued


def _marked(message: Message) -> Message:
    """Return a message with the mark appended to its text."""
    content = message["content"]
    if isinstance(content, list):
        *before, last = content
        return {**message, "content": [*before, {**last, "text": last["text"] + END_MARK}]}
    return {**message, "content": content + END_MARK}


def _up_to_mark(text: str, message: Message) -> str:
    """Return a rendered text up to the end of its last message, found as in transformers. Raises BadRequest."""
    content = message["content"]
    final, mark = content[-1]["text"] if isinstance(content, list) else content, END_MARK.strip()
    if final.strip() not in text or mark not in text:
        reason = "the model's chat template does not show the whole of the last message, which is to be continued"
        raise BadRequest(reason, param="messages")
    end = text.rindex(mark)
    # If the space after the mark is missing, the template strips texts, so this text is stripped too.
    return text[:end] if text.startswith(END_MARK, end) else text[:end].rstrip()


def _line(traceback: TracebackType | None) -> int | str:
    """Return the line of the template that raised an error."""
    line: int | str = "?"
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == "<template>":
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


# ---------------------------------------------------------------- the sandbox


class _GenerationBlocks(jinja2.ext.Extension):
    """Accepts `{% generation %}` blocks, which mark the assistant's text for training, and renders their content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise _RaisedError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which would change the prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment
