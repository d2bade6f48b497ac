"""One request's output: independent of what runs beside it and of where it is resumed, and equal to Hugging Face's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from oracle.peft_oracle import TINY_VOCAB, Lora, Oracle, ask, greedy_request, prompts, tiny_llama, warm

from gpu_worker.planning.request import EngineRequest
from gpu_worker.planning.step_plan import StepPlan
from protocol.wire.messages import Sampling

LORAS = {"x8": Lora(8), "x3": Lora(3, ("q_proj", "v_proj")), "x17": Lora(17)}


@pytest.fixture(scope="module")
def tiny() -> Oracle:
    return Oracle(tiny_llama(), LORAS, scale=0.3)


def sampled_requests(num_tokens: int = 20) -> list[EngineRequest]:
    """Return requests of every adapter and every sampling option."""
    ways: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 1.3, "top_p": 0.9, "presence_penalty": 0.5},
        {"temperature": 0.9, "min_p": 0.05, "frequency_penalty": 0.3},
        {"temperature": 1.1, "typical_p": 0.9, "repetition_penalty": 1.2},
        {"temperature": 0.0, "repetition_penalty": 1.5},
    ]
    names = ["", *LORAS]
    return [
        EngineRequest(
            str(i), 1, names[i % len(names)], prompt, Sampling(seed=i, ignore_eos=True, num_logprobs=2, **ways[i % 6]),
            num_tokens,
        )
        for i, prompt in enumerate(prompts(24, TINY_VOCAB))
    ]  # fmt: skip


def test_seeded_sampling_repeats_whatever_else_is_in_the_batch(tiny: Oracle) -> None:
    requests = sampled_requests()
    together = ask(tiny.engine(), requests)
    few: dict[str, Any] = {"kv_cache_bytes": 24 * 8192, "max_model_len": 96, "max_step_tokens": 64}
    crowded = ask(tiny.engine(**few), reversed(requests))
    for overlapped in (ask(tiny.engine(overlap="on", **own), requests) for own in ({}, few)):
        assert overlapped.ids == together.ids
    alone = tiny.engine()
    for request in requests[::3]:
        assert ask(alone, [request]).ids[request.rid] == together.ids[request.rid]
    assert crowded.ids == together.ids
    assert len({tuple(ids) for ids in together.ids.values()}) == len(requests)
    reseeded = [replace(r, sampling=Sampling(seed=1000, ignore_eos=True)) for r in requests[:1]]
    assert ask(alone, reseeded).ids["0"] != together.ids["0"]


@pytest.mark.parametrize("cut", [1, 7, 19])
def test_a_resumed_request_goes_on_exactly(tiny: Oracle, cut: int) -> None:
    requests = sampled_requests()
    whole = ask(tiny.engine(), requests)
    resumed = ask(tiny.engine(), [replace(r, epoch=2, output=whole.ids[r.rid][:cut]) for r in requests])
    for request in requests:
        assert resumed.ids[request.rid] == whole.ids[request.rid][cut:]
        assert resumed.finish[request.rid].seq0 == 19
        record = len(whole.logprobs[request.rid]) // 20
        got = np.frombuffer(resumed.logprobs[request.rid], "<f4")
        assert np.allclose(got, np.frombuffer(whole.logprobs[request.rid][cut * record :], "<f4"), atol=1e-4)


def test_logprobs_are_those_of_the_model(tiny: Oracle) -> None:
    prompt = prompts(1, TINY_VOCAB, (30,))[0]
    requests = [
        EngineRequest(name, 1, name, prompt, Sampling(seed=4, ignore_eos=True, num_logprobs=3), 6)
        for name in tiny.names
    ]
    asked = ask(tiny.engine(), requests)
    for name in tiny.names:
        ids = np.concatenate([prompt, asked.ids[name]]).astype(np.int64)
        logits = tiny.logits(name, ids)[len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        records = np.frombuffer(asked.logprobs[name], [("chosen", "<f4"), ("top", [("id", "<i4"), ("lp", "<f4")], 3)])
        chosen = expected[torch.arange(6), torch.from_numpy(ids[len(prompt) :])]
        assert np.allclose(records["chosen"], chosen.numpy(), atol=1e-4)
        values, top = expected.topk(3)
        assert records["top"]["id"].tolist() == top.tolist()
        assert np.allclose(records["top"]["lp"], values.numpy(), atol=1e-4)


def test_logprobs_of_the_whole_vocabulary_are_those_of_the_model(tiny: Oracle) -> None:
    """Logprobs over the whole vocabulary, of outputs and prompts, in a batch with requests that want few or none."""
    prompt, num = prompts(1, TINY_VOCAB, (30,))[0], 4
    ways = {"whole": (-1, -1, TINY_VOCAB), "few": (3, 2, 0), "none": (None, None, 0)}
    requests = [
        EngineRequest(
            f"{name} {way}", 1, name, prompt,
            Sampling(seed=4, ignore_eos=True, num_logprobs=top, prompt_logprobs=old, vocabulary=size), num,
        )
        for name in tiny.names
        for way, (top, old, size) in ways.items()
    ]  # fmt: skip
    asked = ask(tiny.engine(), requests)
    found: list[np.ndarray] = []
    for name in tiny.names:
        rid = f"{name} whole"
        assert asked.ids[rid] == asked.ids[f"{name} few"] == asked.ids[f"{name} none"]
        ids = np.concatenate([prompt, asked.ids[rid]]).astype(np.int64)
        expected = tiny.logits(name, ids)[:-1].log_softmax(-1)
        chosen = expected[torch.arange(len(ids) - 1), torch.from_numpy(ids[1:])].numpy()
        output = np.frombuffer(asked.logprobs[rid], "<f4").reshape(num, 1 + TINY_VOCAB)
        assert np.allclose(output[:, 0], chosen[-num:], atol=1e-4)
        assert np.allclose(output[:, 1:], expected[-num:].numpy(), atol=1e-4)
        given = np.frombuffer(asked.prompt_logprobs[rid], "<f4").reshape(len(prompt), 2 + TINY_VOCAB)
        assert np.isnan(given[0, 0])
        assert np.allclose(given[1:, 0], chosen[: len(prompt) - 1], atol=1e-4)
        assert np.allclose(given[1:, 2:], expected[: len(prompt) - 1].numpy(), atol=1e-4)
        found.append(output)
    assert not any(np.allclose(found[0], other, atol=1e-2) for other in found[1:])  # the adapters have an effect


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_logprobs_of_prompts_are_those_of_the_model(tiny: Oracle, overlap: str) -> None:
    """In chunks, beside others, with a cache that only others may use, and after a preemption."""
    size = 2 + 2 * 3
    lengths = [1, 2, 40, 100, 100, 100, 100, 33]
    given = prompts(len(lengths), TINY_VOCAB, lengths)
    given[4:7] = given[3:4] * 3  # four equal prompts: cached blocks must not make the later ones skip logprobs
    names = [*tiny.names, *tiny.names][: len(given)]
    requests = [
        EngineRequest(str(i), 1, name, prompt, Sampling(temperature=0.0, ignore_eos=True, num_logprobs=3), 8)
        for i, (name, prompt) in enumerate(zip(names, given, strict=True))
    ]
    asking = [replace(r, sampling=msgspec.structs.replace(r.sampling, prompt_logprobs=3)) for r in requests]
    engine = tiny.engine(max_model_len=128, max_step_tokens=48, max_num_seqs=8, overlap=overlap)
    plain = ask(engine, requests)
    assert plain.prompt_logprobs == {}
    torn: list[str] = []

    def preempt_in_the_middle(num_steps: int) -> None:
        for seq in engine.batcher.running[::-1]:
            if seq.prompt_logprobs is not None and 0 < seq.num_computed < seq.num_prompt and seq.rid not in torn:
                torn.append(seq.rid)
                engine.batcher._preempt(seq, StepPlan())
                return

    asked = ask(engine, [*asking, *(replace(r, rid=f"plain {r.rid}") for r in requests)], preempt_in_the_middle)
    assert len(torn) > 1
    for request in asking:
        assert asked.ids[request.rid] == asked.ids[f"plain {request.rid}"] == plain.ids[request.rid]
        assert asked.finish[request.rid].num_cached_tokens == 0
        records = np.frombuffer(asked.prompt_logprobs[request.rid], "<f4").reshape(len(request.prompt), size)
        assert np.isnan(records[0, 0])
        assert records[0, 1:].tolist() == [0] * (size - 1)
        ids = request.prompt.astype(np.int64)
        expected = tiny.logits(request.digest, ids)[:-1].log_softmax(-1)
        chosen = expected[torch.arange(len(ids) - 1), torch.from_numpy(ids[1:])]
        assert np.allclose(records[1:, 0], chosen.numpy(), atol=1e-4)
        ranks = (expected > chosen[:, None]).sum(-1) + 1
        assert records[1:, 1].view("<i4").tolist() == ranks.tolist()
        values, top = expected.topk(3)
        assert records[1:, 2::2].view("<i4").tolist() == top.tolist()
        assert np.allclose(records[1:, 3::2], values.numpy(), atol=1e-4)
    resumed = ask(engine, [replace(r, epoch=2, output=plain.ids[r.rid][:3]) for r in asking])
    assert resumed.prompt_logprobs == {}  # they have been in the queue since the first token


def test_a_requests_own_scale_multiplies_the_adapters(tiny: Oracle) -> None:
    prompt = prompts(1, TINY_VOCAB, (30,))[0]
    scales = {"x8": 0.5, "x3": 2.0, "x17": 0.0}
    requests = [
        replace(greedy_request(f"{name}/{scale}", name, prompt, 12), lora_scale=scale)
        for name, scale in scales.items()
        for scale in (1.0, scale)
    ]
    engine = tiny.engine()
    warm(engine, scales)
    asked = ask(engine, requests)
    for name, scale in scales.items():
        assert asked.ids[f"{name}/1.0"] == tiny.greedy(name, prompt, 12)
        scaled = tiny.greedy(name, prompt, 12, scale=scale)
        assert asked.ids[f"{name}/{scale}"] == scaled
        assert scaled != tiny.greedy(name, prompt, 12)


def test_penalties_equal_generate(tiny: Oracle) -> None:
    prompt = prompts(1, TINY_VOCAB, (30,))[0]
    sampling = Sampling(temperature=0.0, repetition_penalty=1.8, ignore_eos=True)
    asked = ask(tiny.engine(), [EngineRequest("x", 1, "x8", prompt, sampling, 20)])
    assert asked.ids["x"] != tiny.greedy("x8", prompt, 20)
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    tiny._model.set_adapter("x8")
    expected = tiny._model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=None,
        pad_token_id=0, repetition_penalty=1.8,
    )  # fmt: skip
    assert asked.ids["x"] == expected[0, 30:].tolist()


def test_adapters_that_arrive_late_join_the_batch(tiny: Oracle) -> None:
    """The pool holds two pages and one adapter needs both, so adapters must alternate."""
    prompt = prompts(1, TINY_VOCAB, (12,))[0]
    engine = tiny.engine(adapter_pool_bytes=300_000)
    assert engine.adapters.pool.capacity[0] == 2
    requests = [greedy_request(f"{name}{i}", name, prompt, 8) for i in range(2) for name in tiny.names]
    asked = ask(engine, requests)
    for request in requests:
        assert asked.ids[request.rid] == tiny.greedy(request.digest, prompt, 8)
    assert asked.most_adapters_in_a_step <= 2
    assert len({tuple(ids) for ids in asked.ids.values()}) == 4
