"""A single grammar is built for all prompts whose answers have the same form."""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from gateway.auth.callers import EVERYBODY
from gateway.calls.constrain import constrain
from gateway.calls.parsed_call import CallOptions
from gateway.calls.tokenize import Prompt, TokenizedCall
from gateway.grammars.check import GrammarCheck
from gateway.overload.large import Checks
from gateway.text.answer_form import AnswerForm
from gateway.tools.definitions import tools_of
from gateway.tools.styles import HERMES, MISTRAL
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest

T = TypeVar("T")

TOOLS = [{"type": "function", "function": {"name": f"f{i}", "parameters": {"type": "object"}}} for i in range(3)]


class Counted(Checks):
    """Counts the jobs."""

    num = 0

    async def do(self, make: Callable[[], T], fields: Collection[str], num_bytes: int, tenant: str) -> T:
        self.num += 1
        return await super().do(make, fields, num_bytes, tenant)


class Verdicts(GrammarCheck):
    """Refuses all grammars, or none."""

    def __init__(self, *, refuses: bool) -> None:
        self.seen: list[str] = []
        self._refuses = refuses

    async def check(self, grammar: str, param: str, tenant: str) -> None:
        self.seen.append(grammar)
        if self._refuses:
            raise BadRequest("it is refused", param=param)


def call_of(prompts: list[Prompt]) -> TokenizedCall:
    options = CallOptions(m.Sampling(), tools=tools_of(TOOLS, None, None, Settings()))
    parsed = SimpleNamespace(options=options, caller=EVERYBODY, form_param="tools")
    resolved: Any = SimpleNamespace(parsed=parsed)
    return TokenizedCall(resolved, prompts)


def prompt_of(files: Any, form: AnswerForm) -> Prompt:
    target: Any = SimpleNamespace(files=files, payer=lambda caller: "tenant")
    return Prompt(target, b"", 1, form=form)


async def test_prompts_of_one_form_share_their_grammar() -> None:
    files = [SimpleNamespace(tokens=SimpleNamespace(added={})) for _ in range(2)]
    forms = [AnswerForm(None, False, style, {}, {}) for style in (HERMES, MISTRAL)]
    each = [prompt_of(file, form) for file in files for form in forms]
    checks, verdicts = Counted(), Verdicts(refuses=False)
    found = (await constrain(call_of([*each, *each] * 16), verdicts, checks)).prompts
    assert checks.num == len(verdicts.seen) == 4
    assert len({id(prompt.grammar) for prompt in found}) == 4
    assert [(prompt.files, prompt.form) for prompt in found] == [(one.files, one.form) for one in each] * 32
    assert found[0].grammar == found[2].grammar != found[1].grammar == found[3].grammar


async def test_a_grammar_that_is_refused_is_made_no_more() -> None:
    files = SimpleNamespace(tokens=SimpleNamespace(added={}))
    checks, verdicts = Counted(), Verdicts(refuses=True)
    prompts = [prompt_of(files, AnswerForm(None, False, HERMES, {}, {}))] * 64
    with pytest.raises(BadRequest, match="it is refused"):
        await constrain(call_of(prompts), verdicts, checks)
    assert checks.num == 2  # the other one is for the outlines
