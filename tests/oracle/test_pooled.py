"""Embeddings and scores by decoders, in the steps that generate text: equal to transformers' classes and PEFT."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.factories import make_tokenizer
from oracle.peft_oracle import (
    TINY_VOCAB,
    Lora,
    Oracle,
    ask,
    greedy_request,
    prompts,
    random_llama,
    refusal,
    tiny_llama,
    warm,
    watch,
)
from oracle.pooled_oracle import (
    MAX_DIFFERENCE,
    MIN_EFFECT,
    Q_V,
    PooledOracle,
    classifier_of,
    difference,
    numbers_of,
    request_for,
)
from oracle.tiny_models import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from gpu_worker.engine.runner import StepInputs
from gpu_worker.model.model import choose_device
from gpu_worker.planning.step_plan import StepPlan
from gpu_worker.tasks.headless import read_decoder
from gpu_worker.tasks.pooling import Pooling, TextPool
from protocol.wire.errors import BadRequest

PADDING_ID = 7
LABELS = {"sorts": 3, "rewards": 1, "many": 5}
EMBEDDERS = ("", "search", "dora")


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    model = tiny_llama()
    model.config.pad_token_id = PADDING_ID
    return model


@pytest.fixture(scope="module")
def oracle(base: PreTrainedModel) -> PooledOracle:
    found = PooledOracle(base)
    found.add("search", "FEATURE_EXTRACTION")
    found.add("dora", "FEATURE_EXTRACTION", use_dora=True, target_modules=["o_proj", "down_proj"])
    found.add("chat", "CAUSAL_LM")
    for name, num in LABELS.items():
        found.add(name, "SEQ_CLS", num, target_modules="all-linear", use_dora=name == "many")
    return found


@pytest.fixture(scope="module")
def chat(base: PreTrainedModel, oracle: PooledOracle) -> Oracle:
    found = Oracle(tiny_llama(), {"chatter": Lora(5)}, scale=0.3)
    oracle.files["chatter"] = found.fetch("chatter")
    return found


def texts() -> list[np.ndarray]:
    """Return texts of several chunks and of one token, none of which ends with the padding token."""
    found = prompts(6, TINY_VOCAB, (1, 17, 32, 45, 70, 3))
    return [np.where(text == PADDING_ID, 8, text).astype(np.int32) for text in found]


def test_one_step_generates_embeds_and_scores(oracle: PooledOracle, chat: Oracle) -> None:
    given = texts()
    requests = [
        *(request_for("embed", f"e{i}{name}", name, text) for i, text in enumerate(given) for name in EMBEDDERS),
        *(request_for("score", f"s{i}{name}", name, text) for i, text in enumerate(given) for name in LABELS),
        *(greedy_request(f"g{i}{name}", name, text, 6) for i, text in enumerate(given) for name in chat.names),
    ]
    engine = oracle.engine(max_step_tokens=48, max_num_seqs=48)
    warm(engine, {request.digest for request in requests})
    kinds = set[frozenset[str]]()

    def look(inputs: StepInputs, _: Tensor) -> None:
        seqs = [*inputs.ready, *(rows.seq for rows in inputs.pooled)]
        kinds.add(frozenset(seq.request.task for seq in seqs))

    watch(engine, look)
    asked = ask(engine, sorted(requests, key=lambda request: request.rid[1:]))
    assert {"generate", "embed", "score"} in kinds
    for i, text in enumerate(given):
        vectors = {name: F.normalize(oracle.hidden(name, text)[-1], dim=0) for name in EMBEDDERS}
        for name, vector in vectors.items():
            assert difference(numbers_of(asked, f"e{i}{name}"), vector) < MAX_DIFFERENCE
            assert not name or (vector - vectors[""]).abs().max() > MIN_EFFECT
        for name in LABELS:
            assert difference(numbers_of(asked, f"s{i}{name}"), oracle.scores(name, text)) < MAX_DIFFERENCE
        for name in chat.names:
            assert asked.ids[f"g{i}{name}"] == chat.greedy(name, text, 6)
        with torch.inference_mode():
            head = oracle.models["many"].get_base_model().score.modules_to_save["default"].weight
            plain = oracle.hidden("", text)[-1] @ head.T
        assert (oracle.scores("many", text) - plain).abs().max() > MIN_EFFECT


def test_a_cached_prefix_gives_the_same_numbers(oracle: PooledOracle) -> None:
    engine = oracle.engine(max_step_tokens=48)
    requests = [
        *(request_for("embed", f"e{i}{name}", name, text) for i, text in enumerate(texts()) for name in EMBEDDERS),
        *(request_for("score", f"s{i}{name}", name, text) for i, text in enumerate(texts()) for name in LABELS),
    ]
    first, again = (ask(engine, requests) for _ in range(2))
    for request in requests:
        got, right = numbers_of(again, request.rid), numbers_of(first, request.rid)
        assert np.abs(got - right).max() < MAX_DIFFERENCE
        num_cached = (len(request.prompt) - 1) // 16 * 16
        assert again.finish[request.rid].num_cached_tokens == num_cached


@pytest.mark.parametrize("mode", ["mean", "max", "cls", "lasttoken"])
def test_texts_are_pooled_over_their_chunks(oracle: PooledOracle, mode: Any, tmp_path: Path) -> None:
    folder = embedding_folder(oracle.base, tmp_path, mode, unit_length=False)
    engine = oracle.engine_of(folder, max_step_tokens=24, max_num_seqs=8)
    given = texts()
    requests = [request_for("embed", f"{i}{name}", name, text) for i, text in enumerate(given) for name in EMBEDDERS]
    torn: list[str] = []

    def preempt_in_the_middle(_: int) -> None:
        for seq in engine.batcher.running[::-1]:
            if seq.rid not in torn and 0 < seq.num_computed < seq.num_tokens:
                torn.append(seq.rid)
                engine.batcher._preempt(seq, StepPlan())
                return

    ask(engine, requests)
    asked = ask(engine, requests, preempt_in_the_middle)
    assert torn or mode != "mean"
    for request in requests:
        expected = Pooling(mode).apply(oracle.hidden(request.digest, request.prompt))
        assert difference(numbers_of(asked, request.rid), expected) < MAX_DIFFERENCE
        if mode != "lasttoken":
            assert asked.finish[request.rid].num_cached_tokens == 0
    assert request_for("embed", "x", "", given[0]).output == []


def embedding_folder(model: PreTrainedModel, folder: Path, mode: str, *, unit_length: bool) -> Path:
    """Write a model folder as sentence-transformers does."""
    model.save_pretrained(folder)
    kinds = ["Transformer", "Pooling", *(["Normalize"] if unit_length else [])]
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": "" if i == 0 else f"{i}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    flag = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}.get(mode, mode)
    (folder / "1_Pooling/config.json").write_text(json.dumps({f"pooling_mode_{flag}": True}))
    return folder


def test_a_classifier_looks_at_the_last_token_that_is_no_padding(oracle: PooledOracle) -> None:
    text = texts()[3]
    padded = [
        np.append(text, [PADDING_ID] * 2), np.append([PADDING_ID], text), np.full(20, PADDING_ID),
        np.concatenate((text[:5], [PADDING_ID] * 20)),
    ]  # fmt: skip
    requests = [request_for("score", str(i), "sorts", one) for i, one in enumerate(padded)]
    asked = ask(oracle.engine(), requests)
    for request in requests:
        expected = oracle.scores("sorts", request.prompt)
        assert difference(numbers_of(asked, request.rid), expected) < MAX_DIFFERENCE
    assert difference(numbers_of(asked, "3"), oracle.scores("sorts", text)) > MIN_EFFECT


# ---------------------------------------------------------------- folders without a language model's head


def test_a_classifier_is_served_from_its_folder(oracle: PooledOracle, tmp_path: Path) -> None:
    classifier = classifier_of(oracle.base, 3)
    classifier.config.id2label = {0: "bad", 1: "so-so", 2: "good"}
    classifier.save_pretrained(tmp_path)
    engine = oracle.engine_of(tmp_path)
    assert engine.model.tasks.labels == ["bad", "so-so", "good"]
    assert (engine.model.tasks.main, engine.model.tasks.names) == ("score", {"score", "embed"})
    requests = [
        *(request_for("score", f"{i}{name}", name, t) for i, t in enumerate(texts()) for name in ("", *LABELS)),
        request_for("score", "plain", "search", texts()[3]),
        request_for("embed", "vector", "search", texts()[3]),
    ]
    asked = ask(engine, requests)
    for i, text in enumerate(texts()):
        with torch.inference_mode():
            expected = classifier(input_ids=torch.from_numpy(text.astype(np.int64))[None]).logits[0]
        assert difference(numbers_of(asked, str(i)), expected) < MAX_DIFFERENCE
        for name in LABELS:
            assert difference(numbers_of(asked, f"{i}{name}"), oracle.scores(name, text)) < MAX_DIFFERENCE
    hidden = oracle.hidden("search", texts()[3])[-1]
    with torch.inference_mode():
        under_adapter = F.linear(hidden, classifier.get_parameter("score.weight"))
    assert difference(numbers_of(asked, "plain"), under_adapter) < MAX_DIFFERENCE
    assert difference(numbers_of(asked, "vector"), F.normalize(hidden, dim=0)) < MAX_DIFFERENCE
    assert "does not generate" in refusal(engine, greedy_request("g", "", texts()[1], 3)).message


def test_decoders_without_a_head_embed_alone(oracle: PooledOracle, tmp_path: Path) -> None:
    bare, headless = tmp_path / "bare", embedding_folder(oracle.base, tmp_path / "less", "lasttoken", unit_length=True)
    base: Any = oracle.base
    base.model.save_pretrained(bare)
    drop_head(headless)
    for folder in (bare, headless):
        engine = oracle.engine_of(folder)
        assert (engine.model.tasks.main, engine.model.tasks.names) == ("embed", {"embed", "score"})
        requests = [request_for("embed", f"{i}{name}", name, t) for i, t in enumerate(texts()) for name in EMBEDDERS]
        asked = ask(engine, [*requests, request_for("score", "s", "sorts", texts()[2])])
        for request in requests:
            expected = F.normalize(oracle.hidden(request.digest, request.prompt)[-1], dim=0)
            assert difference(numbers_of(asked, request.rid), expected) < MAX_DIFFERENCE
        assert difference(numbers_of(asked, "s"), oracle.scores("sorts", texts()[2])) < MAX_DIFFERENCE
        assert "does not generate" in refusal(engine, greedy_request("g", "", texts()[1], 3)).message
    (headless / "modules.json").unlink()
    with pytest.raises(BadRequest, match="lm_head"):
        read_decoder(headless, choose_device("cpu"), torch.float32)


def drop_head(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    save_file(tensors, file, {"format": "pt"})


# ---------------------------------------------------------------- rerankers


@pytest.fixture
def reranker(tmp_path: Path) -> tuple[Path, Oracle, int, int]:
    tokenizer = make_tokenizer()
    model = random_llama(
        std=0.2, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loras = {"judge": Lora(4, ("q_proj", "lm_head")), "other": Lora(3)}
    yes, no = (tokenizer.get_vocab()[word] for word in "yn")
    return tmp_path, Oracle(model, loras, scale=0.4), yes, no


def test_a_reranker_reads_its_score_off_two_tokens(reranker: tuple[Path, Oracle, int, int]) -> None:
    folder, oracle, yes, no = reranker
    pooled = PooledOracle(oracle.untouched)
    pooled.files.update({name: oracle.fetch(name) for name in ("judge", "other")})
    modules = [{"path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}]
    modules.append({"path": "1_LogitScore", "type": "sentence_transformers.cross_encoder.modules.LogitScore"})
    by_setting = pooled.engine_of(folder, score_tokens="n,y", max_step_tokens=32, max_num_seqs=16)
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_LogitScore").mkdir()
    (folder / "1_LogitScore/config.json").write_text(json.dumps({"true_token_id": yes, "false_token_id": no}))
    by_folder = pooled.engine_of(folder, max_step_tokens=32, max_num_seqs=16)
    given = texts()
    requests = [
        *(request_for("score", f"s{i}{name}", name, text) for i, text in enumerate(given) for name in oracle.names),
        *(request_for("embed", f"e{i}", "", text) for i, text in enumerate(given)),
        *(greedy_request(f"g{i}", "other", text, 4) for i, text in enumerate(given)),
    ]
    for engine in (by_setting, by_folder):
        assert engine.model.tasks.labels == ["LABEL_0"]
        asked = ask(engine, requests)
        for i, text in enumerate(given):
            logits = {name: oracle.logits(name, text)[-1] for name in oracle.names}
            for name, own in logits.items():
                assert difference(numbers_of(asked, f"s{i}{name}"), (own[yes] - own[no])[None]) < MAX_DIFFERENCE
            assert abs((logits["judge"] - logits[""])[[yes, no]].diff()) > MIN_EFFECT
            assert asked.ids[f"g{i}"] == oracle.greedy("other", text, 4)


@pytest.mark.parametrize(("named", "reason"), [("n", "names two tokens"), ("n,yesyes", "no token 'yesyes'")])
def test_tokens_of_a_score_that_are_none(reranker: tuple[Path, Any, int, int], named: str, reason: str) -> None:
    with pytest.raises(BadRequest, match=reason):
        read_decoder(reranker[0], choose_device("cpu"), torch.float32, named)


# ---------------------------------------------------------------- refusals, ends


def test_what_cannot_be_asked_is_refused_by_name(oracle: PooledOracle) -> None:
    text = texts()[1]
    oracle.files["activated"] = replace(
        oracle.files["search"], config=oracle.files["search"].config | {"alora_invocation_tokens": [1, 2]}
    )
    cases = {
        "generates no text": greedy_request("a", "sorts", text, 3),
        "neither this adapter nor its base has a classification head": request_for("score", "b", "search", text),
        "this base model has no classification head": request_for("score", "c", "", text),
        "the text is empty": request_for("embed", "d", "", text[:0]),
        "the text has 129 tokens": request_for("embed", "e", "", np.resize(text, 129)),
        f"outside 0 … {TINY_VOCAB - 1}": request_for("score", "f", "sorts", text + TINY_VOCAB),
        "it does not classify": request_for("classify", "g", "", text),
        "alora_invocation_tokens": request_for("embed", "h", "activated", text),
    }
    asked = ask(
        oracle.engine(max_model_len=128), [*cases.values(), request_for("embed", "whole", "", np.resize(text, 128))]
    )
    for reason, request in cases.items():
        error = asked.finish[request.rid].error
        assert isinstance(error, BadRequest)
        assert reason in error.message
    assert len(numbers_of(asked, "whole")) == 64


def test_a_result_that_is_in_the_log_already_ends_the_request(oracle: PooledOracle) -> None:
    request = request_for("embed", "x", "", texts()[1])
    ids = ask(oracle.engine(), [request]).ids["x"]
    again = ask(oracle.engine(), [replace(request, epoch=2, output=ids)])
    assert (again.ids["x"], again.finish["x"].finish, again.finish["x"].seq0) == ([], "stop", len(ids))


def test_texts_that_yield_let_others_pass(oracle: PooledOracle) -> None:
    """They are preempted by other tenants' chats, begin again, and return the same values."""
    engine = oracle.engine(max_num_seqs=2, max_step_tokens=16, max_slowdown=0)
    late = [request_for("embed", str(i), "", texts()[4], tenant="greedy", yields=True) for i in range(3)]
    for request in late:
        engine.add(request)
    outputs = engine.step()
    asked = ask(engine, [greedy_request(f"g{i}", "", texts()[1], 4, tenant="other") for i in range(2)])
    assert not outputs
    assert engine.counters.num_preemptions
    expected = F.normalize(oracle.hidden("", texts()[4])[-1], dim=0)
    assert all(difference(numbers_of(asked, request.rid), expected) < MAX_DIFFERENCE for request in late)


@pytest.mark.parametrize(("model_type", "targets"), [("qwen3_next", Q_V), ("bloom", ("query_key_value",))])
def test_texts_of_models_with_states_and_of_those_one_by_one(model_type: str, targets: Sequence[str]) -> None:
    base = tiny_model(model_type)
    oracle = PooledOracle(base)
    oracle.add("search", "CAUSAL_LM", target_modules=list(targets))
    oracle.add("sorts", "SEQ_CLS", 3, target_modules=list(targets))
    engine = oracle.engine(max_step_tokens=24, max_num_seqs=4)
    given = prompts(4, base.config.vocab_size, (40, 70, 17, 3))
    requests = [request_for("embed", f"{i}{name}", name, t) for i, t in enumerate(given) for name in ("", "search")]
    scores = [request_for("score", f"s{i}", "sorts", text) for i, text in enumerate(given)]
    for asked in (ask(engine, [*requests, *scores]), ask(engine, requests)):
        for request in requests:
            expected = F.normalize(oracle.hidden(request.digest, request.prompt)[-1], dim=0)
            assert difference(numbers_of(asked, request.rid), expected) < MAX_DIFFERENCE
        if "s0" in asked.finish:
            for request in scores:
                assert (
                    difference(numbers_of(asked, request.rid), oracle.scores("sorts", request.prompt)) < MAX_DIFFERENCE
                )
    is_packed = engine.model.passes is None
    assert any(end.num_cached_tokens for end in asked.finish.values()) == is_packed


def test_a_pool_begins_anew_with_the_first_token() -> None:
    hidden = torch.randn(9, 4)
    for mode in ("mean", "max"):
        pool = TextPool(mode)
        pool.add(torch.full((3, 4), 100.0), 0)
        for start, end in ((0, 4), (4, 5), (5, 9)):
            pool.add(hidden[start:end], start)
        assert torch.allclose(pool.vector, Pooling(mode).apply(hidden), atol=1e-6)  # the order of sums differs
