"""Models whose layers keep states: whatever happens to a request, its tokens are those of transformers and PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.factories import make_tokenizer
from oracle.adapters.peft_kinds import (
    INVOCATION,
    MAX_DIFFERENCE,
    Kind,
    check_exact,
    difference,
    engine_logits,
    make_adapter,
    model_logits,
)
from oracle.cases import NUM_TOKENS, Case
from oracle.peft_oracle import Lora, Oracle, ask, greedy_request, prompts, warm
from oracle.test_grammars import assert_late_masks_change_no_token
from oracle.tiny_models import tiny_config, tiny_model

from gpu_worker.planning.sequence import Sequence
from gpu_worker.planning.states import OUTPUT_TOKENS, PROMPT_TOKENS
from gpu_worker.planning.step_plan import StepPlan
from protocol.runtime.settings import BLOCK_TOKENS
from protocol.wire.errors import BadRequest
from protocol.wire.messages import Sampling

TYPES = {
    "qwen3_5_text": "gated delta rule beside attention",
    "kimi_linear": "delta rule with a decay for each channel",
    "falcon_h1": "scan and attention in one layer",
    "nemotron_h": "scan whose steps are limited in prompts only",
    "jamba": "selective scan",
    "mamba": "no attention at all",
    "lfm2": "short convolution only",
    "minimax": "linear attention written into the layer",
}


RARE = ("falcon_h1", "nemotron_h", "jamba")
"""Types only for `make test-models`: another type has each of their mixers too."""


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.models if name in RARE else ()) for name in TYPES]
)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_every_adapter_changes_the_answer(case: Case) -> None:
    case.check_effect()


@pytest.mark.parametrize(("step_tokens", "overlap"), [(24, "off"), (400, "off"), (24, "on")])
def test_prompts_in_chunks_and_saved_states_change_no_token(case: Case, step_tokens: int, overlap: str) -> None:
    engine = case.oracle.engine(max_step_tokens=step_tokens, max_num_seqs=8, overlap=overlap)
    warm(engine, case.oracle.names)
    for again in range(2):
        before = engine.counters.num_cached_tokens
        asked = ask(engine, case.requests())
        found = engine.counters.num_cached_tokens - before
        case.check(asked)
        if again:  # cached up to the last full block of each prompt that does not contain its last token
            full = [(len(prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS for prompt in case.prompts]
            assert found == len(case.oracle.names) * sum(full)


def test_prompts_that_begin_alike_share_a_state(case: Case) -> None:
    engine = case.oracle.engine(max_num_seqs=1, max_step_tokens=400)
    asked = ask(engine, case.requests([""])[3:])
    assert [asked.ids["/3"], asked.ids["/4"]] == case.expected[""][3:]
    assert [asked.finish[f"/{i}"].num_cached_tokens for i in (3, 4)] == [0, PROMPT_TOKENS]


def test_who_loses_place_and_states_says_the_same(case: Case) -> None:
    case.check_preempted(case.oracle.engine(max_num_seqs=4, max_step_tokens=64, prefix_cache=False))


def test_an_output_that_another_worker_began_goes_on(case: Case) -> None:
    case.check_begun(case.oracle.engine(max_num_seqs=4))


class Knowing:
    """A draft model that knows the expected outputs, and changes some of their tokens."""

    def __init__(self, expected: Mapping[str, list[int]]) -> None:
        """expected: request id -> output ids."""
        self._expected = expected
        self._rng = np.random.default_rng(1)

    def propose(self, limits: Mapping[Sequence, int], plan: StepPlan) -> dict[Sequence, list[int]]:
        found: dict[Sequence, list[int]] = {}
        for seq, limit in limits.items():
            draft = np.array(self._expected[seq.rid][seq.num_output :][:limit])
            found[seq] = np.where(self._rng.random(len(draft)) < 0.2, 7, draft).tolist()
        return found

    def watching(self, plan: StepPlan) -> AbstractContextManager[None]:
        return nullcontext()

    def take_seconds(self) -> float:
        return 0.0

    def learn(self, seq: Sequence, num_drafted: int, num_right: int) -> None: ...
    def note_step(self, plan: StepPlan, seconds: float) -> None: ...
    def forget(self, seq: Sequence) -> None: ...
    def check_integrity(self) -> None: ...


def test_draft_tokens_right_or_wrong_change_no_token(case: Case) -> None:
    """After wrong drafts, states are reset to those before the step; the second run finds some in the prefix cache."""
    engine = case.oracle.engine(max_num_seqs=3, max_draft_tokens=4)
    expected = {f"{name}/{i}": ids for name, own in case.expected.items() for i, ids in enumerate(own)}
    engine.batcher.draft_model = Knowing(expected)
    warm(engine, case.oracle.names)
    for _ in range(2):
        case.check(ask(engine, case.requests()))
    counters = engine.counters
    assert 0 < counters.num_model_accepted_tokens < counters.num_model_drafted_tokens
    assert counters.num_cached_tokens > 0


def test_draft_tokens_change_nothing_that_is_drawn(case: Case) -> None:
    plain, engine = case.oracle.engine(max_num_seqs=3), case.oracle.engine(max_num_seqs=3, max_draft_tokens=4)
    for one in (plain, engine):
        warm(one, case.oracle.names)
    requests = [
        replace(request, sampling=Sampling(temperature=0.5, seed=i, num_logprobs=2, ignore_eos=True))
        for i, request in enumerate(case.requests())
    ]
    wanted = ask(plain, requests)
    engine.batcher.draft_model = Knowing(wanted.ids)
    asked = ask(engine, requests)
    assert asked.ids == wanted.ids
    for rid, record in wanted.logprobs.items():
        own, other = (np.frombuffer(one, "<f4") for one in (asked.logprobs[rid], record))
        assert np.allclose(own, other, atol=1e-3, equal_nan=True)
    assert 0 < engine.counters.num_model_accepted_tokens < engine.counters.num_model_drafted_tokens


def test_who_loses_its_place_between_drafts_says_the_same(case: Case) -> None:
    engine = case.oracle.engine(max_num_seqs=4, max_step_tokens=64, prefix_cache=False, max_draft_tokens=4)
    case.check_preempted(engine)
    case.check_begun(case.oracle.engine(max_num_seqs=2, max_draft_tokens=4))


def test_the_next_turn_of_a_conversation_finds_the_answer_before(case: Case) -> None:
    [prompt], num = prompts(1, 190, (9,)), OUTPUT_TOKENS + 8
    engine = case.oracle.engine(max_num_seqs=2)
    first = ask(engine, [greedy_request("first", "few", prompt, num)])
    assert first.ids["first"] == case.oracle.greedy("few", prompt, num)
    turn = np.concatenate((prompt, np.array(first.ids["first"], np.int32), prompt))
    second = ask(engine, [greedy_request("second", "few", turn, NUM_TOKENS)])
    assert second.ids["second"] == case.oracle.greedy("few", turn, NUM_TOKENS)
    saved = 0 if engine.model.mixers.tells_prompts_apart else OUTPUT_TOKENS
    assert second.finish["second"].num_cached_tokens == saved


def test_a_prompt_shares_nothing_with_an_output_of_limited_steps() -> None:
    """The first of two equal prompts computes what was an output before; the second finds that in the prefix cache."""
    model = tiny_model("nemotron_h", time_step_min=0.3, time_step_max=0.6)
    engine = Oracle(model, {}, scale=0.4).engine(max_num_seqs=2)
    [prompt] = prompts(1, 190, (20,))
    begun = ask(engine, [greedy_request("begun", "", prompt, 60)]).ids["begun"]
    turn = np.concatenate((prompt, np.array(begun, np.int32), prompt))
    for rid in ("first", "second"):
        ids, logits = engine_logits(engine, [greedy_request(rid, "", turn, 1)])[rid]
        assert difference(logits, model_logits(model, turn, ids)) <= MAX_DIFFERENCE
    full = [(len(text) - 1) // BLOCK_TOKENS * BLOCK_TOKENS for text in (prompt, turn)]
    assert engine.counters.num_cached_tokens == sum(full)


def test_masks_that_are_late_change_no_token() -> None:
    tokenizer = make_tokenizer().backend_tokenizer
    base = tiny_model("qwen3_5_text", vocab_size=tokenizer.get_vocab_size())
    oracle = Oracle(base, {"x": Lora(4, ("q_proj", "in_proj_qkv", "out_proj"))}, scale=0.4)
    for overlap in ("off", "on"):
        assert_late_masks_change_no_token(oracle, tokenizer, max_step_tokens=64, overlap=overlap)


def test_states_take_their_part_of_the_cache() -> None:
    case = Oracle(tiny_model("qwen3_5_text"), {}, scale=0.4)
    engine = case.engine(kv_cache_bytes=1 << 20)
    config, slot_bytes = engine.config, engine.model.mixers.slot_bytes
    assert (config.num_states + 1) * slot_bytes <= 1 << 19
    assert 1 <= config.limits.max_num_seqs <= config.num_states // 2
    few = 5 * slot_bytes
    with pytest.raises(BadRequest, match=f"kv_cache_bytes is {few}, of which half holds 1 states"):
        case.engine(kv_cache_bytes=few)


KINDS = {"dora": {"use_dora": True}, "activated": {"alora_invocation_tokens": INVOCATION}}
PROJECTIONS = {
    "qwen3_5_text": ["in_proj_qkv", "in_proj_z", "in_proj_b", "out_proj"],
    "kimi_linear": ["q_proj", "v_proj", "b_proj", "o_proj"],
    "falcon_h1": ["in_proj", "q_proj"],
    "mamba2": ["in_proj"],
    "jamba": ["in_proj", "x_proj", "out_proj"],
    "lfm2": ["in_proj", "out_proj"],
    "minimax": ["qkv_proj", "output_gate", "out_proj"],
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("model_type", PROJECTIONS)
def test_adapters_of_other_kinds_on_a_mixers_own_projections(model_type: str, name: str, tmp_path: Path) -> None:
    """In one mixed batch with the base, with prompts in chunks."""
    base = (model_type, tiny_config(model_type).to_dict())
    kind = Kind(base, {"target_modules": PROJECTIONS[model_type], **KINDS[name]})
    make_adapter(kind, tmp_path)
    check_exact(kind, tmp_path, max_step_tokens=24, max_num_seqs=8)
