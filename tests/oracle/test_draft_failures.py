"""A draft model that fails, or whose drafts are useless: outputs stay the same, and steps soon stop waiting for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import pytest
import torch
from oracle.peft_oracle import TINY_VOCAB, Oracle, ask, greedy_request, prompts, random_llama
from oracle.test_draft_model import NUM_TOKENS, SPECULATING, Always, draft_model_of, drafting
from oracle.test_grammars import TOKENIZER, grammar
from oracle.test_grammars import VOCAB as WORDS
from torch import Tensor

from gpu_worker.drafting.draft_model import FAILURE_STEPS
from gpu_worker.drafting.load import LoadedDraft
from gpu_worker.drafting.payoff import Draftable, DraftChoice
from gpu_worker.model.model import BaseModel
from gpu_worker.planning.step_plan import StepPlan


class PanicException(BaseException):
    """A panic as pyo3 raises it."""


class ByShares(Always):
    """Drafts while every sequence has a share of correct tokens above one half, whatever the cost."""

    def choose(self, seqs: Sequence[Draftable], most: int, num_tokens: int) -> DraftChoice:
        """Choose the maximum number of draft tokens, or none."""
        return super().choose(seqs, most, num_tokens) if min(one.rate for one in seqs) > 0.5 else DraftChoice()

    def is_probe_due(self, num_tokens: int) -> bool:
        """Return False: passes that only measure would disturb the counts of drafting passes."""
        return False


class Watched(BaseModel):
    """A model whose logits can be changed."""

    passes_seen: list[int]  # tokens of each pass since `change` was set
    change: Callable[[Tensor], Tensor] | None = None

    def forward(self, input_ids: Tensor, position_ids: Tensor, logit_rows: Tensor | None) -> Tensor:
        """Run the step and apply `change` to its logits."""
        logits = super().forward(input_ids, position_ids, logit_rows)
        if self.change is None:
            return logits
        self.passes_seen.append(len(input_ids))
        return self.change(logits)


def watched(draft: LoadedDraft) -> LoadedDraft:
    """Return a draft model whose logits can be changed."""
    own = draft.model
    return replace(draft, model=Watched(**{field.name: getattr(own, field.name) for field in fields(own)}))


def count_passes(draft: LoadedDraft, change: Callable[[Tensor], Tensor]) -> list[int]:
    """Return a list to which each pass from now on appends its number of tokens. change: applied to the logits."""
    assert isinstance(draft.model, Watched)
    draft.model.passes_seen, draft.model.change = [], change
    return draft.model.passes_seen


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("no memory"), RuntimeError("bug"), PanicException("panic")],
    ids=["memory", "bug", "panic"],
)
@pytest.mark.parametrize("after", [0, 2])
def test_a_pass_that_fails_costs_no_answer_and_is_not_tried_again_soon(
    tiny: Oracle, error: BaseException, after: int
) -> None:
    """In the first pass of a draft, or in a later one."""
    draft = watched(drafting(tiny.untouched))
    engine = tiny.engine(draft=draft, **SPECULATING)
    source = draft_model_of(engine)
    num = 0

    def fail(logits: Tensor) -> Tensor:
        nonlocal num
        num += 1
        if num == 1 + after:
            raise error
        return logits

    passes = count_passes(draft, fail)
    texts = prompts(3, TINY_VOCAB)
    asked = ask(engine, [greedy_request(str(i), "", text, NUM_TOKENS) for i, text in enumerate(texts)])
    for i, text in enumerate(texts):
        assert asked.ids[str(i)] == tiny.greedy("", text, NUM_TOKENS)
    assert NUM_TOKENS < FAILURE_STEPS
    assert len(passes) == 1 + after
    assert source.blocks.num_free == source.blocks.num_blocks


def test_after_a_failure_it_drafts_again_some_time(tiny: Oracle) -> None:
    draft = watched(drafting(tiny.untouched))
    engine = tiny.engine(draft=draft, **SPECULATING)
    errors = [RuntimeError("once")]

    def fail(logits: Tensor) -> Tensor:
        if errors:
            raise errors.pop()
        return logits

    source = draft_model_of(engine)
    count_passes(draft, fail)
    request = greedy_request("r", "", prompts(1, TINY_VOCAB)[0], NUM_TOKENS)
    first = ask(engine, [request]).ids
    assert engine.counters.num_model_drafted_tokens == 0
    for _ in range(source._num_idle):
        assert source.propose({}, StepPlan()) == {}
    assert ask(engine, [request]).ids == first
    assert engine.counters.num_model_accepted_tokens == engine.counters.num_model_drafted_tokens > 0


def test_a_text_whose_blocks_were_taken_earns_its_reading_anew(tiny: Oracle) -> None:
    """Otherwise texts that take each other's blocks would be read again in every step."""
    engine = tiny.engine(draft=drafting(tiny.untouched), **SPECULATING)
    source = draft_model_of(engine)
    request = greedy_request("r", "", prompts(1, TINY_VOCAB)[0], NUM_TOKENS)
    engine.add(request)
    first: list[int] = []
    while len(first) < 10:
        first += [token for output in engine.step() for token in output.ids]
    [own] = source._readings.values()
    assert (own.num_steps, own.num_read) > (0, 0)
    source._take_blocks(own)
    assert (own.num_steps, own.num_read, source.blocks.num_free) == (0, 0, source.blocks.num_blocks)
    assert first + ask(engine, []).ids["r"] == tiny.greedy("", request.prompt, NUM_TOKENS)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_no_numbers_draft_wrong_tokens_and_no_more(tiny: Oracle, value: float) -> None:
    draft = watched(drafting(tiny.untouched))
    engine = tiny.engine(draft=draft, **SPECULATING)
    count_passes(draft, lambda logits: torch.full_like(logits, value))
    [text] = prompts(1, TINY_VOCAB)
    assert ask(engine, [greedy_request("r", "", text, NUM_TOKENS)]).ids["r"] == tiny.greedy("", text, NUM_TOKENS)
    assert engine.counters.num_model_accepted_tokens < engine.counters.num_model_drafted_tokens


def test_drafts_that_a_grammar_forbids_count_as_wrong() -> None:
    """They are cut off before the step, so that no step finds them wrong."""
    base = random_llama(
        std=0.2, vocab_size=WORDS, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    oracle = Oracle(base, {}, scale=1)
    draft = watched(replace(drafting(base), payoff=ByShares()))
    engine = oracle.engine(TOKENIZER, draft=draft, **SPECULATING)
    never = WORDS - 1  # a token that the grammar never allows

    def only(logits: Tensor) -> Tensor:
        return torch.zeros_like(logits).index_fill_(1, torch.tensor([never]), 1.0)

    passes = count_passes(draft, only)
    request = replace(
        greedy_request("r", "", prompts(1, WORDS)[0], NUM_TOKENS), grammar=grammar(lark_grammar="start: /[a-f]{60}/")
    )
    asked = ask(engine, [request])
    assert len(asked.ids["r"]) == NUM_TOKENS
    assert 0 < len(passes) < 30
