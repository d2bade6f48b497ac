"""The grammar of answers with a limit on reasoning."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.scripted_fleet import make_model_folder
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer

from gateway.grammars.notation import grammar_text
from gateway.text.answer_form import AnswerForm, answer_grammar
from gateway.text.answer_parts import THOUGHTS
from gateway.tools.definitions import tools_of
from gateway.tools.styles import HERMES
from protocol.runtime.settings import Settings

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("marks", [None, False, True], ids=["written", "added", "special"])
def test_reasoning_ends_with_its_limit(tmp_path: Path, marks: bool | None) -> None:
    """The marks are text, or separate tokens that llguidance treats as special, or special tokens."""
    tokenizer = Tokenizer.from_file(str(make_model_folder(tmp_path) / "tokenizer.json"))
    if marks is not None:
        tokens = ("<tool_call>", "</tool_call>", "<think>", "</think>")
        tokenizer.add_tokens([AddedToken(token, special=marks) for token in tokens])
    added = {token.content: id_ for id_, token in tokenizer.get_added_tokens_decoder().items()}
    vocabulary = LLTokenizer(tokenizer.to_str(), eos_token=1)
    tools = tools_of([TOOL], None, None, Settings())
    constraint = {"json_schema": {"type": "integer"}}
    for opened in (False, True):
        for held, tool, answer in ((None, None, "Well: <b>, 5."), (constraint, None, "5"), (None, tools, "Hello")):
            form = AnswerForm(THOUGHTS[0], opened, HERMES if tool else None, {}, {})
            made = answer_grammar(held, tool, form, added.get, 5)
            if "</think>" not in added and not (held or tool):
                assert made == []  # the mark can't be forced
                continue
            matcher = LLMatcher(vocabulary, grammar_text(*made))
            assert not matcher.is_error(), matcher.get_error()
            for num, good in ((5, True), (6, "</think>" not in added)):
                text = ("" if opened else "<think>") + "x" * num + "</think>\n\n" + answer
                ids = tokenizer.encode(text, add_special_tokens=False).ids
                copy = matcher.deep_copy()
                assert (copy.try_consume_tokens(ids) == len(ids) and copy.is_accepting()) == good, (text, opened)
            if not opened:  # the limit can't be bypassed
                copy = matcher.deep_copy()
                ids = tokenizer.encode("\n<think>" + "x" * 9, add_special_tokens=False).ids
                assert "</think>" not in added or copy.try_consume_tokens(ids) < len(ids)
