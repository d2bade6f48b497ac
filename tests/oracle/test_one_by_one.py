"""Sequences that run unbatched: whatever happens to a request, its tokens are those of transformers and PEFT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import examples
from helpers.factories import make_tokenizer
from oracle.adapters.peft_kinds import INVOCATION, MAX_DIFFERENCE, Kind, check_exact, make_adapter
from oracle.cases import NUM_TOKENS, Case
from oracle.peft_oracle import Lora, Oracle, ask, greedy_request, prompts, warm
from oracle.test_grammars import assert_late_masks_change_no_token
from oracle.tiny_models import tiny_config, tiny_model

from gpu_worker.build import build_engine
from gpu_worker.engine.engine import Engine
from gpu_worker.model.prepare import prepare_model
from gpu_worker.one_by_one.passes import Kept
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest
from protocol.wire.messages import Sampling

TYPES = {
    "falcon": "chunks",  # computes attention inside the layer
    "bart": "chunks",  # own positions
    "rwkv": "chunks",  # a state outside the cache object
    "deepseek_v32": "chunks",  # an index of keys in the cache
    "recurrent_gemma": "tokens",  # states in attributes of modules
    "openai-gpt": "nothing",
}


RARE = ("deepseek_v32", "bart")
"""Types only for `make test-models`: the others take the same code paths."""


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.models if name in RARE else ()) for name in TYPES]
)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param, long=(25,))


def engine_of(case: Case, **settings: Any) -> Engine:
    engine = case.oracle.engine(**settings)
    assert engine.model.passes is not None
    return engine


def test_every_adapter_changes_the_answer(case: Case) -> None:
    case.check_effect()


@pytest.mark.parametrize("step_tokens", [24, 400])
def test_prompts_in_chunks_change_no_token(case: Case, step_tokens: int) -> None:
    if case.oracle.untouched.config.model_type == "openai-gpt":
        step_tokens = 400  # a step must fit each whole text
    engine = engine_of(case, max_step_tokens=step_tokens, max_num_seqs=16)
    warm(engine, case.oracle.names)
    asked = ask(engine, case.requests())
    case.check(asked)
    assert asked.most_adapters_in_a_step >= 2
    assert engine.counters.num_cached_tokens == 0


def test_who_loses_its_place_says_the_same(case: Case) -> None:
    case.check_preempted(engine_of(case, max_num_seqs=4, max_step_tokens=400))


def test_an_output_that_another_worker_began_goes_on(case: Case) -> None:
    case.check_begun(engine_of(case, max_num_seqs=4))


def test_a_request_that_is_cancelled_leaves_nothing(case: Case) -> None:
    engine = engine_of(case)
    warm(engine, case.oracle.names)
    for request in case.requests():
        engine.add(request)
    engine.step()
    seqs = list(engine.batcher.running)
    assert engine.model.passes is not None
    assert all((seq.kept is None) == (engine.model.passes.continues == "nothing") for seq in seqs)
    for seq in seqs:
        engine.cancel(seq.rid)
    assert all(seq.kept is None for seq in seqs)
    assert engine.blocks.num_free == engine.blocks.num_blocks
    engine.check_integrity()


def test_no_cache_takes_more_than_its_account(case: Case) -> None:
    engine = engine_of(case)
    passes = engine.model.passes
    assert passes is not None
    measured: list[int] = []

    def look(_: int) -> None:
        for seq in engine.batcher.running:
            if isinstance(seq.kept, Kept):
                allowed = passes.account.sequence_bytes + passes.account.token_bytes * seq.num_computed
                assert seq.kept.num_bytes <= allowed, seq.rid
                measured.append(allowed)

    ask(engine, case.requests([""]), look)
    assert bool(measured) == (passes.continues != "nothing")


def test_logprobs_of_a_prompt_are_recorded(case: Case) -> None:
    engine = engine_of(case, max_step_tokens=400)
    prompt = case.prompts[2]
    sampling = Sampling(temperature=0.0, ignore_eos=True, prompt_logprobs=1)
    requests = [replace(greedy_request(name or "base", name, prompt, 4), sampling=sampling) for name in ("", "all")]
    asked = ask(engine, requests)
    for request in requests:
        got = np.frombuffer(asked.prompt_logprobs[request.rid], "<f4").reshape(len(prompt), -1)[1:, 0]
        logits = case.oracle.logits(request.digest, prompt)[:-1].log_softmax(-1)
        expected = logits[range(len(prompt) - 1), prompt[1:]]
        assert np.abs(got - expected.numpy()).max() < MAX_DIFFERENCE


KINDS = {
    "dora": {"use_dora": True},
    "norms": {"modules_to_save": ["ln_f"]},
    "activated": {"alora_invocation_tokens": INVOCATION},
}
BLOOM = ("bloom", {"n_layer": 2, "n_head": 4})


@pytest.mark.parametrize("name", KINDS)
def test_adapters_that_do_more_than_lora(name: str, tmp_path: Path) -> None:
    kind = Kind(BLOOM, {"target_modules": ["query_key_value", "dense", "dense_h_to_4h"], **KINDS[name]})
    make_adapter(kind, tmp_path)
    check_exact(kind, tmp_path)


OF_A_TEXT = {
    "lora": {}, "dora": {"use_dora": True}, "biases": {"lora_bias": True},
    "weights": {"modules_to_save": ["kv_b_proj"]},
}  # fmt: skip
"""Adapters of a layer whose input has four dimensions, which PEFT's activated LoRA does not accept."""


@pytest.mark.parametrize("name", OF_A_TEXT)
def test_layers_that_see_all_of_a_text_have_adapters(name: str, tmp_path: Path) -> None:
    """A layer that adapters may change computes keys and values again from what the cache keeps of each token."""
    fields = {k: v for k, v in tiny_config("deepseek_v32").to_dict().items() if k not in ("model_type", "dtype")}
    targets = ["kv_a_proj_with_mqa"] if name == "weights" else ["kv_b_proj"]
    kind = Kind(("deepseek_v32", fields), {"target_modules": targets, **OF_A_TEXT[name]})
    make_adapter(kind, tmp_path)
    check_exact(kind, tmp_path)


OF_AN_END = {"lora": {}, "activated": {"alora_invocation_tokens": INVOCATION}, "dora": {"use_dora": True}}


@pytest.mark.parametrize("name", examples.some(OF_AN_END, "activated"))
def test_layers_that_see_the_end_of_a_text_have_adapters(name: str, tmp_path: Path) -> None:
    """Doge computes masks from the values in a window: fewer rows than the text has, and more than the pass."""
    kind = Kind(("doge", {"sliding_window": 12}), {"target_modules": ["dt_proj", "q_proj"], **OF_AN_END[name]})
    make_adapter(kind, tmp_path)
    check_exact(kind, tmp_path, max_step_tokens=16)


@pytest.mark.parametrize("name", ["dora", "weights"])
def test_a_linear_layer_of_a_class_of_its_own_is_one(name: str, tmp_path: Path) -> None:
    """Falcon's linear layers compute the same as torch's, so adapters that need their weights are served."""
    fields = {"dora": {"use_dora": True}, "weights": {"modules_to_save": ["query_key_value"]}}[name]
    targets = ["dense"] if name == "weights" else ["query_key_value", "dense_4h_to_h"]
    kind = Kind(("falcon", {"bias": True}), {"target_modules": targets, **fields})
    make_adapter(kind, tmp_path)
    check_exact(kind, tmp_path)


@pytest.mark.parametrize("model_type", ["falcon", "openai-gpt"])
def test_masks_that_are_late_change_no_token(model_type: str) -> None:
    tokenizer = make_tokenizer().backend_tokenizer
    base = tiny_model(model_type, vocab_size=tokenizer.get_vocab_size())
    targets = ("query_key_value", "dense") if model_type == "falcon" else ("c_attn", "c_fc")
    options = {"fan_in_fan_out": True} if model_type == "openai-gpt" else {}
    oracle = Oracle(base, {"x": Lora(4, targets, options)}, scale=0.4)
    assert_late_masks_change_no_token(oracle, tokenizer, max_step_tokens=512)


def test_caches_take_their_part_of_the_memory() -> None:
    oracle = Oracle(tiny_model("rwkv"), {}, scale=0.4)
    model = prepare_model(tiny_model("rwkv"), frozenset(), None)
    assert model.passes is not None
    account = model.passes.account
    assert account.token_bytes == 0
    config = oracle.engine(kv_cache_bytes=10 * account.sequence_bytes).config
    assert config.limits.max_num_seqs == 5
    few = 2 * account.sequence_bytes - 1
    with pytest.raises(BadRequest, match=f"kv_cache_bytes is {few}"):
        oracle.engine(kv_cache_bytes=few)


def test_settings_that_need_packed_steps_are_refused() -> None:
    oracle = Oracle(tiny_model("falcon"), {}, scale=0.4)
    with pytest.raises(BadRequest, match="max_draft_tokens is 4, but this model's sequences run unbatched"):
        oracle.engine(max_draft_tokens=4)
    with pytest.raises(BadRequest, match="compile is on, but this model's sequences run unbatched"):
        prepare_model(tiny_model("falcon"), frozenset(), None, compiled=True)
    with pytest.raises(BadRequest, match="overlap is on, but this model's sequences run unbatched"):
        oracle.engine(overlap="on")
    assert not oracle.engine().config.limits.prefix_cache


def test_a_text_that_is_computed_anew_fits_one_step() -> None:
    oracle = Oracle(tiny_model("openai-gpt"), {}, scale=0.4)
    assert oracle.engine(max_step_tokens=100).config.max_model_len == 100
    model = prepare_model(tiny_model("openai-gpt"), frozenset(), None)
    settings = Settings(model="oracle", max_step_tokens=100, max_model_len=200)
    with pytest.raises(BadRequest, match="max_model_len is 200"):
        build_engine(model, settings, oracle.fetch)


def test_a_step_counts_a_pass_for_each_sequence() -> None:
    """The step time model then knows their cost, so that yielding sequences stay within their limit."""
    oracle = Oracle(tiny_model("falcon"), {}, scale=0.4)
    engine = oracle.engine()
    ask(engine, [greedy_request(f"{i}", "", prompt, NUM_TOKENS) for i, prompt in enumerate(prompts(4, 190))])
    engine.meter.fit._count_new()
    assert engine.meter.fit._targets[4] > 0
