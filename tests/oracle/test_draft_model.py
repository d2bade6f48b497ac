"""A draft model changes no output, however wrong it is: tokens are those of transformers and PEFT."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.factories import make_tokenizer
from oracle import test_grammars
from oracle.adapters.peft_kinds import LLAMA, Kind, asked_prompts, make_adapter, make_base, make_engine
from oracle.adapters.virtual_cases import SOFT, SOME
from oracle.peft_oracle import TINY_VOCAB, Lora, Oracle, ask, greedy_request, prompts, random_llama, tiny_llama, warm
from oracle.test_grammars import TOKENIZER, requests_of
from oracle.tiny_models import tiny_model
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM, PreTrainedModel

from gpu_worker.build import load_engine
from gpu_worker.drafting.draft_model import DraftModel
from gpu_worker.drafting.load import LoadedDraft, check_vocabulary, load_draft_model
from gpu_worker.drafting.payoff import Draftable, DraftChoice, Payoff
from gpu_worker.engine.engine import Engine
from gpu_worker.model.model import BaseModel
from gpu_worker.model.prepare import prepare_model
from gpu_worker.planning.request import EngineRequest
from gpu_worker.planning.sequence import Sequence as RequestSequence
from gpu_worker.planning.step_plan import StepPlan
from protocol.runtime.settings import DRAFT_TOKENS, Settings
from protocol.wire.errors import BadRequest
from protocol.wire.messages import Sampling
from tests.gpu_worker.planning.batches import make_seq

NUM_TOKENS = 40
FEW_BLOCKS: dict[str, Any] = {"kv_cache_bytes": 34 * 16 * 512, "max_model_len": 128, "max_num_seqs": 8}
SPECULATING: dict[str, Any] = {"max_draft_tokens": 4, "max_num_seqs": 3}


class Always(Payoff):
    """Lets the draft model draft whenever possible, whatever the cost."""

    def __init__(self, num_read: int = 1 << 20) -> None:
        """num_read: maximum number of tokens that the draft model reads at once."""
        super().__init__()
        self._num_read = num_read

    def choose(self, seqs: Sequence[Draftable], most: int, num_tokens: int) -> DraftChoice:
        """Choose the maximum number of draft tokens."""
        return DraftChoice(most, self._num_read)


def near(model: PreTrainedModel, noise: float = 0.02) -> PreTrainedModel:
    """Return a copy of a model with perturbed weights, whose drafts are right about half of the time."""
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    return changed


def other_llama() -> LlamaForCausalLM:
    """Return a random Llama with more tokens than the base, whose drafts are hardly ever right."""
    return random_llama(
        std=0.3, vocab_size=TINY_VOCAB + 57, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip


def drafting(model: PreTrainedModel, num_read: int = 1 << 20) -> LoadedDraft:
    """Return a copy of a model as a draft model that drafts whenever possible."""
    return LoadedDraft(prepare_model(copy.deepcopy(model), frozenset(), None), Always(num_read))


def draft_model_of(engine: Engine) -> DraftModel:
    """Return an engine's draft model."""
    source = engine.batcher.draft_model
    assert isinstance(source, DraftModel)
    return source


def watch_drafts(engine: Engine) -> list[tuple[np.ndarray, list[int]]]:
    """Return a list to which each draft of the engine's draft model is appended, with its text."""
    source = draft_model_of(engine)
    propose, found = source.propose, list[tuple[np.ndarray, list[int]]]()

    def spy(limits: Mapping[RequestSequence, int], plan: StepPlan) -> dict[RequestSequence, list[int]]:
        drafts = propose(limits, plan)
        found.extend((seq.tokens.copy(), draft) for seq, draft in drafts.items())
        return drafts

    source.propose = spy
    return found


@pytest.mark.parametrize(
    "settings",
    [{}, pytest.param({"max_step_tokens": 12}, marks=pytest.mark.thorough), FEW_BLOCKS],
    ids=["plain", "chunked", "preempted"],
)
def test_greedy_answers_are_pefts(tiny: Oracle, settings: dict[str, Any]) -> None:
    texts = prompts(5, TINY_VOCAB, (3, 8, 17, 24, 31))
    names = tiny.names if settings is FEW_BLOCKS else tiny.names[:6]
    engine = tiny.engine(draft=drafting(near(tiny.untouched), num_read=20), **SPECULATING | settings)
    warm(engine, names)
    asked = ask(engine, [greedy_request(name, name, texts[i % 5], NUM_TOKENS) for i, name in enumerate(names)])
    for i, name in enumerate(names):
        assert asked.ids[name] == tiny.greedy(name, texts[i % 5], NUM_TOKENS), name
        assert not name or asked.ids[name] != tiny.greedy("", texts[i % 5], NUM_TOKENS), "it changes the answer"
    counters = engine.counters
    assert 0 < counters.num_model_accepted_tokens < counters.num_model_drafted_tokens < counters.num_drafted_tokens
    assert counters.num_output_tokens == NUM_TOKENS * len(names)
    assert (counters.num_preemptions > 0) == (settings is FEW_BLOCKS)
    assert counters.draft_s > 0


@pytest.mark.parametrize(
    "num_read", [12, pytest.param(1 << 20, marks=pytest.mark.thorough)], ids=["in-chunks", "at-once"]
)
def test_drafts_are_what_the_draft_model_says_by_itself(tiny: Oracle, num_read: int) -> None:
    """After right and wrong drafts, and beside others: its cache matches each text."""
    model = near(tiny.untouched)
    alone, engine = (
        Oracle(copy.deepcopy(model), {}, scale=1),
        tiny.engine(draft=drafting(model, num_read), **SPECULATING),
    )
    found = watch_drafts(engine)
    texts = prompts(3, TINY_VOCAB, (3, 24, 45))
    ask(engine, [greedy_request(str(i), ("", "a2", "")[i], text, NUM_TOKENS) for i, text in enumerate(texts)])
    assert len(found) > 12
    for text, draft in found[::2]:
        assert draft == alone.greedy("", text, len(draft))
    rights = {draft == tiny.greedy("", text, len(draft)) for text, draft in found}
    assert rights == {True, False}


def test_the_bases_twin_is_always_right_about_the_base(tiny: Oracle) -> None:
    engine = tiny.engine(draft=drafting(tiny.untouched), **SPECULATING)
    asked = ask(engine, [greedy_request(str(i), "", text, NUM_TOKENS) for i, text in enumerate(prompts(3, TINY_VOCAB))])
    for i, text in enumerate(prompts(3, TINY_VOCAB)):
        assert asked.ids[str(i)] == tiny.greedy("", text, NUM_TOKENS)
    counters = engine.counters
    assert 0 < counters.num_model_drafted_tokens == counters.num_model_accepted_tokens
    assert counters.num_steps < NUM_TOKENS, "a step brings several tokens of each"


def test_a_draft_model_that_is_wrong_costs_no_answer(tiny: Oracle) -> None:
    engine = tiny.engine(draft=drafting(other_llama()), **SPECULATING)
    texts = prompts(3, TINY_VOCAB, (3, 24, 45))
    asked = ask(engine, [greedy_request(str(i), ("", "a2", "")[i], text, 20) for i, text in enumerate(texts)])
    for i, text in enumerate(texts):
        assert asked.ids[str(i)] == tiny.greedy(("", "a2", "")[i], text, 20)
    counters = engine.counters
    assert counters.num_model_accepted_tokens < counters.num_model_drafted_tokens / 4


def compare_drawn(oracle: Oracle, plain: Engine, speculating: Engine) -> None:
    """Compare the outputs of two engines for requests with sampling, penalties, stop strings and logprobs."""
    ways: list[dict[str, Any]] = [
        {"temperature": 0.3},
        {"temperature": 0.5, "top_p": 0.8, "num_logprobs": 2},
        {"temperature": 0.0, "repetition_penalty": 1.05, "num_logprobs": 3},
        {"temperature": 0.0, "frequency_penalty": 0.2, "min_tokens": 20, "ignore_eos": False},
        {"temperature": 0.2, "presence_penalty": 0.1, "prompt_logprobs": 1},
    ]
    texts = prompts(5, TINY_VOCAB, (3, 8, 17, 24, 31))
    requests = [
        EngineRequest(
            str(i), 1, oracle.names[i % len(oracle.names)], texts[i % 5],
            Sampling(**{"seed": i, "ignore_eos": True} | ways[i % 5]), NUM_TOKENS,
            stop_token_ids=[int(t) for t in range(0, TINY_VOCAB, 9)] if i % 5 == 3 else [],
        )
        for i in range(15)
    ]  # fmt: skip
    for engine in (plain, speculating):
        warm(engine, oracle.names)
    wanted, asked = ask(plain, requests), ask(speculating, requests)
    assert asked.ids == wanted.ids
    finishes = {rid: output.finish for rid, output in asked.finish.items()}
    assert finishes == {rid: output.finish for rid, output in wanted.finish.items()}
    assert set(finishes.values()) == {"stop", "length"}
    for kept, own in ((wanted.logprobs, asked.logprobs), (wanted.prompt_logprobs, asked.prompt_logprobs)):
        assert kept.keys() == own.keys()
        for rid, record in kept.items():
            assert len(own[rid]) == len(record)
            assert np.allclose(np.frombuffer(own[rid], "<f4"), np.frombuffer(record, "<f4"), atol=1e-4, equal_nan=True)
    assert 0 < speculating.counters.num_model_accepted_tokens < speculating.counters.num_model_drafted_tokens


def test_drawn_penalised_and_stopped_answers_are_those_without_drafts(tiny: Oracle) -> None:
    compare_drawn(tiny, tiny.engine(), tiny.engine(draft=drafting(near(tiny.untouched)), **SPECULATING))


@pytest.mark.thorough
def test_outputs_are_their_grammars_likeliest() -> None:
    base = random_llama(
        std=0.2, vocab_size=test_grammars.VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    oracle = Oracle(base, {"x1": Lora(4)}, scale=0.3)
    engine = oracle.engine(TOKENIZER, draft=drafting(near(oracle.untouched)), **SPECULATING)
    warm(engine, oracle.names)
    requests = [request for request in requests_of(oracle) if request.grammar]
    asked = ask(engine, requests)
    for request in requests:
        assert asked.ids[request.rid] == test_grammars.by_hand(oracle, request), request.rid
    assert engine.counters.num_model_accepted_tokens > 0
    assert {end.error for end in asked.finish.values()} == {None}


def test_a_request_resumed_in_the_middle_goes_on_exactly(tiny: Oracle) -> None:
    [text] = prompts(1, TINY_VOCAB, (24,))
    whole, draft = tiny.greedy("a2", text, NUM_TOKENS), near(tiny.untouched)
    for cut in (1, 13, NUM_TOKENS - 2):
        engine = tiny.engine(draft=drafting(draft), **SPECULATING)
        assert ask(engine, [greedy_request("r", "a2", text, NUM_TOKENS, output=whole[:cut])]).ids["r"] == whole[cut:]


def test_cached_blocks_hold_no_wrong_draft(tiny: Oracle) -> None:
    """Prompts that begin with an earlier output use its blocks in the prefix cache."""
    engine, names = tiny.engine(draft=drafting(near(tiny.untouched)), **SPECULATING), tiny.names[:4]
    [text] = prompts(1, TINY_VOCAB, (45,))
    first = ask(engine, [greedy_request(name, name, text, NUM_TOKENS) for name in names]).ids
    counters = engine.counters
    assert 0 < counters.num_model_accepted_tokens < counters.num_model_drafted_tokens
    before = counters.num_cached_tokens
    longer = {name: np.concatenate((text, ids)).astype(np.int32) for name, ids in first.items()}
    second = ask(engine, [greedy_request(name, name, prompt, 8) for name, prompt in longer.items()]).ids
    assert counters.num_cached_tokens - before >= 80 * len(longer)
    for name, prompt in longer.items():
        assert second[name] == tiny.greedy(name, prompt, 8), name


def test_a_cancelled_request_leaves_nothing_behind(tiny: Oracle) -> None:
    engine = tiny.engine(draft=drafting(tiny.untouched), **SPECULATING)
    source = draft_model_of(engine)
    texts = prompts(2, TINY_VOCAB, (24, 17))
    for i, text in enumerate(texts):
        engine.add(greedy_request(str(i), "", text, NUM_TOKENS))
    while not engine.counters.num_model_drafted_tokens:
        engine.step()
    held = source.blocks.num_blocks - source.blocks.num_free
    engine.cancel("0")
    assert 0 < source.blocks.num_blocks - source.blocks.num_free < held
    assert ask(engine, []).finish["1"].finish == "length"
    assert source.blocks.num_free == source.blocks.num_blocks
    assert not source._readings


def four_blocks(oracle: Oracle) -> Engine:
    """Return an engine whose draft model, a copy of the base, has four blocks."""
    draft = drafting(oracle.untouched)
    [layer, _] = draft.model.layers
    engine = oracle.engine(draft=draft, **SPECULATING, kv_cache_bytes=8 * 4 * 2 * layer.block_bytes(torch.float32))
    assert draft_model_of(engine).blocks.num_blocks == 4
    return engine


def test_texts_without_room_are_answered_without_drafts(tiny: Oracle) -> None:
    engine = four_blocks(tiny)
    short, other, long = prompts(3, TINY_VOCAB, (17, 24, 70))
    engine.add(greedy_request("short", "", short, NUM_TOKENS))
    engine.add(greedy_request("long", "", long, 12))
    asked = ask(engine, [greedy_request("other", "", other, 25)])
    assert asked.ids["short"] == tiny.greedy("", short, NUM_TOKENS)
    assert asked.ids["long"] == tiny.greedy("", long, 12)
    assert asked.ids["other"] == tiny.greedy("", other, 25)
    counters = engine.counters
    assert 0 < counters.num_model_drafted_tokens == counters.num_model_accepted_tokens, "once the long one has ended"


def test_blocks_are_those_of_the_texts_that_are_drafted_for(tiny: Oracle) -> None:
    """Blocks are taken from other texts, which are read again later."""
    source = draft_model_of(four_blocks(tiny))
    first, second, long = (make_seq("", text, 30) for text in prompts(3, TINY_VOCAB, (37, 40, 70)))

    def drafts(*seqs: RequestSequence) -> list[list[int]]:
        found = source.propose(dict.fromkeys(seqs, 2), StepPlan(num_new=dict.fromkeys(seqs, 1)))
        source.check_integrity()
        return list(found.values())

    for seq in (first, second, first):
        assert drafts(seq) == [tiny.greedy("", seq.tokens, 2)]
        assert source.blocks.num_free == 1
    assert drafts(long) == drafts(first, second) == []
    assert drafts(second) == [tiny.greedy("", second.tokens, 2)]
    source.forget(second)
    assert source.blocks.num_free == 4


def test_adapters_of_other_vocabularies_and_of_virtual_tokens(tmp_path: Path) -> None:
    """The draft model never drafts a token that an adapter lacks, and reads a text without its virtual tokens."""
    kinds = {
        "fewer": Kind(LLAMA, {"modules_to_save": ["embed_tokens", "lm_head"]}, num_tokens=150),
        "more": Kind(LLAMA, {"modules_to_save": ["embed_tokens", "lm_head"]}, num_tokens=TINY_VOCAB + 5),
        "virtual": Kind(LLAMA, SOME, config=SOFT),
    }
    folders = {name: tmp_path / name for name in kinds}
    for name, kind in kinds.items():
        make_adapter(kind, folders[name], scale=0.1)
    requests = [
        greedy_request(f"{name}/{i}", name, prompt, NUM_TOKENS)
        for name, kind in kinds.items()
        for i, prompt in enumerate(asked_prompts(kind))
    ]
    plain = make_engine(LLAMA, folders)
    engine = make_engine(LLAMA, folders, draft=drafting(near(make_base(LLAMA), noise=0.01)), **SPECULATING)
    found = watch_drafts(engine)
    for one in (plain, engine):
        warm(one, kinds)
    assert ask(engine, requests).ids == ask(plain, requests).ids
    assert any((text < 0).any() and draft for text, draft in found)
    assert engine.counters.num_model_accepted_tokens > 0


# ---------------------------------------------------------------- what is refused at the start


def saved(model: PreTrainedModel, tokenizer: Tokenizer | None, folder: Path) -> str:
    """Save a model folder; return its path."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(tokenizer.to_str())
    return str(folder)


def load_for(model: str, tokenizer: Tokenizer | None = TOKENIZER) -> LoadedDraft:
    """Load a draft model for a base with this tokenizer."""
    text = tokenizer.to_str() if tokenizer is not None else None
    draft = load_draft_model(model, text, prepare_model(tiny_llama(), frozenset(), None), None)
    assert isinstance(draft, LoadedDraft)
    return draft


def test_a_folder_with_the_bases_vocabulary_is_loaded(tmp_path: Path) -> None:
    base = random_llama(
        std=0.2, vocab_size=test_grammars.VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    draft = load_for(saved(base, TOKENIZER, tmp_path / "draft"))
    assert draft.model.vocab_size == test_grammars.VOCAB


def test_settings_load_it_and_the_fleet_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFLEET_CACHE_DIR", str(tmp_path / "cache"))
    shape = {"vocab_size": test_grammars.VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    base = random_llama(std=0.2, num_hidden_layers=2, num_key_value_heads=2, **shape)
    folder, small = saved(base, TOKENIZER, tmp_path / "base"), saved(near(base), TOKENIZER, tmp_path / "small")
    settings = Settings(
        model=folder, draft_model=small, dtype="float32", device="cpu", kv_cache_bytes=1 << 20,
        adapter_pool_bytes=1 << 20, threads=1,
    )  # fmt: skip
    thread, served = load_engine(settings, lambda _: pytest.fail("no adapter is asked for"))
    engine = thread.engine
    assert isinstance(engine, Engine)
    assert served.draft_model == "small"
    assert engine.config.limits.max_draft_tokens == DRAFT_TOKENS
    draft = draft_model_of(engine)
    assert isinstance(draft.model, BaseModel)
    [layer, _] = draft.model.layers
    num_bytes = draft.blocks.num_blocks * 2 * layer.block_bytes(torch.float32)
    assert num_bytes <= settings.kv_cache_bytes // 8
    assert engine.config.kv_bytes + num_bytes <= settings.kv_cache_bytes
    [text] = prompts(1, test_grammars.VOCAB, (24,))
    asked = ask(engine, [greedy_request("r", "", text, 60)])
    assert asked.ids["r"] == Oracle(base, {}, scale=1).greedy("", text, 60)
    thread.engine.close()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [({"draft_model": "small"}, "draft_model is small"), ({"max_draft_tokens": 4}, "max_draft_tokens is 4")],
    ids=["model", "lookup"],
)
def test_encoders_refuse_to_speculate_by_name(tmp_path: Path, given: dict[str, Any], wanted: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    settings = Settings(model=str(tmp_path), device="cpu", **given)
    with pytest.raises(BadRequest, match=f"{wanted}, which is served for causal LMs only: leave it out"):
        load_engine(settings, lambda _: pytest.fail("no adapter is asked for"))


def test_steps_that_overlap_are_refused(tiny: Oracle) -> None:
    with pytest.raises(BadRequest, match="overlap is on, but draft_model is small: how many draft tokens are right"):
        tiny.engine(draft_model="small", overlap="on")


def test_what_cannot_draft_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"draft_model is /none/such: .* is neither a folder nor a Hub id"):
        load_for("/none/such")
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = random_llama(std=0.2, vocab_size=test_grammars.VOCAB, num_key_value_heads=2, **small)
    without = saved(base, None, tmp_path / "without")
    with pytest.raises(BadRequest, match=rf"draft_model is {without}: it has no tokenizer.json"):
        load_for(without)
    with pytest.raises(BadRequest, match=r"the base has no tokenizer.json"):
        load_for(saved(base, TOKENIZER, tmp_path / "own"), None)
    hybrid = tiny_model("qwen3_5_text", vocab_size=test_grammars.VOCAB)
    with pytest.raises(BadRequest, match="its layers keep states, which cannot roll back a token"):
        load_for(saved(hybrid, TOKENIZER, tmp_path / "hybrid"))
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    with pytest.raises(BadRequest, match="it is no causal language model, but BertModel"):
        load_for(str(encoder))


def test_another_vocabulary_is_refused_with_a_token_that_differs(tmp_path: Path) -> None:
    own = json.loads(TOKENIZER.to_str())
    vocab = own["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.get)[20:22]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(own))
    token, id_ = min((first, 21), (second, 20))
    with pytest.raises(BadRequest) as caught:
        check_vocabulary(TOKENIZER.to_str(), tmp_path)
    wanted = f"token {token!r} has the id {id_}, in the base's {41 - id_}; so it is with 1 more"
    assert wanted in caught.value.message
    larger = make_tokenizer().backend_tokenizer
    larger.add_tokens(["<more>"])
    file.write_text(larger.to_str())
    with pytest.raises(BadRequest, match=r"token '<more>' has the id \d+, in the base's none; so it is with 0 more"):
        check_vocabulary(TOKENIZER.to_str(), tmp_path)
    file.write_text(TOKENIZER.to_str())
    check_vocabulary(TOKENIZER.to_str(), tmp_path)
    file.write_bytes(b"\xff{}")
    with pytest.raises(BadRequest, match=r"its tokenizer.json is not in UTF-8: .* byte 0xff in position 0"):
        check_vocabulary(TOKENIZER.to_str(), tmp_path)


def test_a_share_of_the_cache_that_holds_no_block_is_refused(tiny: Oracle) -> None:
    with pytest.raises(
        BadRequest, match=r"kv_cache_bytes leaves the draft model 4096 bytes, one part in 8, and a block"
    ):
        tiny.engine(draft=drafting(tiny.untouched), **SPECULATING, kv_cache_bytes=8 * 4096, max_model_len=32)
