"""How a chat answer is to be read, and the grammar that makes it readable: reasoning, text, tool calls. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from gateway.answer_parts import END_THINK, THINK, AnswerParts
from gateway.structured import Constraint, lark_string
from gateway.tokenizer import ModelFiles
from gateway.tools import MarkerId, Tools, ToolStyle, style_of, tool_grammar


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """What a chat answer may consist of besides text."""

    reasons: bool  # the template knows reasoning
    opened: bool  # the prompt ends within it
    style: ToolStyle | None  # of calls, if any may come
    shown: Mapping[int, str]  # special tokens that matter in it, and are no part of a text otherwise

    def splitter(self) -> AnswerParts:
        """Return what splits one answer."""
        return AnswerParts(reasons=self.reasons, opened=self.opened, style=self.style)

    def call_id(self, rid: str, index: int) -> str:
        """Return the id of a request's call: whoever reads the answer again finds the same."""
        num = self.style.id_characters if self.style is not None else 24
        digest = hashlib.sha256(f"{rid}/{index}".encode()).hexdigest()[:num]
        return digest if num == 9 else f"call_{digest}"


def form_of(files: ModelFiles, tools: Tools | None, *, opened: bool) -> AnswerForm | None:
    """Return what an answer may consist of; None if of nothing but text."""
    template = files.template.source if files.template is not None else ""
    reasons = END_THINK in template
    if not reasons and tools is None:
        return None
    style = style_of(template) if tools is not None else None
    markers = [THINK, END_THINK, "[TOOL_CALLS]", "<tool_call>", "</tool_call>"]
    find = marker_ids(files)
    known = {id_: text for text in markers if (id_ := find(text)) is not None}
    shown = {id_: text for id_, text in known.items() if files.token_text.is_special(id_)}
    return AnswerForm(reasons, opened, style, shown)


def marker_ids(files: ModelFiles) -> MarkerId:
    """Return what finds the id of a marker that is one token."""

    def find(text: str) -> int | None:
        id_ = files.tokenizer.token_to_id(text)
        return id_ if id_ is not None and files.token_text.is_added(id_) else None

    return find


def answer_grammar(
    constraint: Constraint | None, tools: Tools | None, form: AnswerForm | None, marker: MarkerId
) -> list[Constraint]:
    """Return the grammars of an answer, the first its own; none if anything will do."""
    if tools is not None and form is not None and form.style is not None:
        grammars = tool_grammar(tools, form.style, marker, constraint, reasons=form.reasons and not form.opened)
    elif constraint is not None:
        grammars = [constraint]
    else:
        return []
    if form is None or not form.reasons:
        return grammars
    return [_after_reasoning(marker, opened=form.opened), {**grammars[0], "name": "answer"}, *grammars[1:]]


def _after_reasoning(marker: MarkerId, *, opened: bool) -> Constraint:
    """Return the grammar of reasoning, which is free, and the answer behind it, which is not."""
    begin, end = marker(THINK), marker(END_THINK)
    # Spelled out, an end that is a token of its own would look like it.
    other = "" if end is None else " & ~/(?s:.*)<\\/think>(?s:.*)/"
    rules = [f"THOUGHT: /(?s:.*)/{other}", r"GAP: /[ \n]{1,4}/"]
    if end is None:
        rules += ["thought: thought_end GAP?", f"thought_end[lazy]: THOUGHT {lark_string(END_THINK)}"]
    else:
        rules += [f"thought: THOUGHT <[{end}]> GAP?"]
    opening = lark_string(THINK) if begin is None else f"<[{begin}]>"
    start = "start: thought @answer" if opened else f"start: ({opening} thought)? @answer"
    return {"lark_grammar": "\n".join([start, *rules])}
