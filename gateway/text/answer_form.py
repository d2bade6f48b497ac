"""The form of a chat answer with reasoning, text and tool calls: how it is parsed, and its grammar. Pure."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial

from gateway.grammars.notation import Constraint, lark_regex, lark_string
from gateway.overload.large import FEW_BYTES
from gateway.text.answer_parts import THOUGHTS, AnswerParts, Thought
from gateway.text.tokenizer import ModelFiles
from gateway.tools.definitions import Tools
from gateway.tools.grammar import tool_grammar
from gateway.tools.styles import MarkerId, ToolStyle, style_of
from gateway.tools.xml_calls import raw_parameters


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """The allowed parts of a chat answer besides text."""

    thought: Thought | None  # the marks of reasoning, if the template has them
    opened: bool  # the prompt ends within the reasoning
    style: ToolStyle | None  # how tool calls are written, if they are allowed
    shown: Mapping[int, str]  # text of the special tokens that delimit parts; other special tokens are not shown
    raw: Mapping[str, Collection[str]]  # tool -> its parameters whose values are raw text in tags, not JSON

    def splitter(self) -> AnswerParts:
        """Return a new splitter for one answer."""
        return AnswerParts(thought=self.thought, opened=self.opened, style=self.style, raw=self.raw)

    def call_id(self, rid: str, index: int, prefix: str = "call_") -> str:
        """Return the id of a request's tool call, which is the same on each reading. prefix: depends on the API."""
        num = self.style.id_characters if self.style is not None else 24
        digest = hashlib.sha256(f"{rid}/{index}".encode()).hexdigest()[:num]
        return digest if num == 9 else prefix + digest


def form_of(files: ModelFiles, tools: Tools | None, *, opened: bool, continued: bool = False) -> AnswerForm | None:
    """Return the form of an answer; None if it is plain text. opened: the prompt ends within the reasoning.

    continued: the prompt ends within the answer's text, after any reasoning.
    """
    template = files.template.source if files.template is not None else ""
    thought = None if continued else next((marks for marks in THOUGHTS if marks[1] in template), None)
    if thought is None and tools is None:
        return None
    style = style_of(template) if tools is not None else None
    markers = [*(thought or ()), "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "<tool_call>", "</tool_call>"]
    find = marker_ids(files)
    known = {id_: text for text in markers if (id_ := find(text)) is not None}
    shown = {id_: text for id_, text in known.items() if id_ in files.tokens.special}
    in_tags = tools.schemas if tools is not None and style is not None and style.body == "xml" else {}
    raw = {name: raw_parameters(schema) for name, schema in in_tags.items()}
    return AnswerForm(thought, opened, style, shown, raw)


async def found_form(
    files: ModelFiles, tools: Tools | None, *, opened: bool, continued: bool = False
) -> AnswerForm | None:
    """Return `form_of(…)`, in a thread if many tools make it slow."""
    make = partial(form_of, files, tools, opened=opened, continued=continued)
    return make() if tools is None or tools.num_bytes <= FEW_BYTES else await asyncio.to_thread(make)


def marker_ids(files: ModelFiles) -> MarkerId:
    """Return a function that returns the id of a marker if it is a single token of a model."""
    return files.tokens.added.get


def answer_grammar(
    constraint: Constraint | None,
    tools: Tools | None,
    form: AnswerForm | None,
    marker: MarkerId,
    max_thought: int | None = None,
) -> list[Constraint]:
    """Return the grammar of an answer, followed by the grammars that it refers to by name; [] if unconstrained.

    max_thought: maximum reasoning tokens, after which the end mark is forced; None for no limit. Ignored if the mark is
    not a single token, since only a token can be forced.
    """
    if form is None or form.thought is None or marker(form.thought[1]) is None:
        max_thought = None
    if tools is not None and form is not None and form.style is not None:
        opening = form.thought[0] if form.thought is not None and not form.opened else ""
        grammars = tool_grammar(tools, form.style, marker, constraint, thought=opening)
    elif constraint is not None:
        grammars = [constraint]
    elif max_thought is not None and form is not None and form.thought is not None:
        # An answer may not open reasoning itself, which would have no limit.
        text = f"TEXT: /(?s:.*)/ & ~/[ \\n]*{lark_regex(form.thought[0])}(?s:.*)/"
        grammars = [{"lark_grammar": f"start: TEXT\n{text}"}]
    else:
        return []
    if form is None or form.thought is None:
        return grammars
    return [
        _after_reasoning(form.thought, marker, opened=form.opened, limit=max_thought),
        {**grammars[0], "name": "answer"},
        *grammars[1:],
    ]


def _after_reasoning(thought: Thought, marker: MarkerId, *, opened: bool, limit: int | None) -> Constraint:
    """Return the grammar of free reasoning, followed by an answer of the grammar named `answer`.

    limit: maximum reasoning tokens, None for no limit.
    """
    begin, end = map(marker, thought)
    # If the end mark is one token, other tokens must not spell its text.
    other = "" if end is None else f" & ~/(?s:.*){lark_regex(thought[1])}(?s:.*)/"
    rules = [f"THOUGHT: /(?s:.*)/{other}", r"GAP: /[ \n]{1,4}/"]
    if end is None:
        rules += ["thought: thought_end GAP?", f"thought_end[lazy]: THOUGHT {lark_string(thought[1])}"]
    else:
        words = "THOUGHT" if limit is None else "words"
        rules += [f"thought: {words} <[{end}]> GAP?"]
        rules += [] if limit is None else [f"words[max_tokens={limit}]: THOUGHT"]
    opening = lark_string(thought[0]) if begin is None else f"<[{begin}]>"
    start = "start: thought @answer" if opened else f"start: ({opening} thought)? @answer"
    return {"lark_grammar": "\n".join([start, *rules])}
