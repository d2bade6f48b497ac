"""Speculation changes no output: tokens are those of Hugging Face and PEFT, and of an engine without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from oracle.peft_oracle import TINY_VOCAB, Asked, Oracle, ask, greedy_request, prompts, warm

from gpu_worker.engine.engine import Engine
from gpu_worker.planning.request import EngineRequest
from protocol.wire.messages import Sampling

NUM_TOKENS = 40
FEW_BLOCKS: dict[str, Any] = {"kv_cache_bytes": 30 * 16 * 512, "max_model_len": 128}
SPECULATING: dict[str, Any] = {"max_draft_tokens": 6, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def repetitive() -> list[np.ndarray]:
    """Return prompts that repeat themselves."""
    return [np.concatenate((part, part[: len(part) // 2])) for part in prompts(5, TINY_VOCAB, (3, 8, 17, 24, 31))]


def ask_few(engine: Engine, requests: Sequence[EngineRequest]) -> Asked:
    """Run requests four at a time, so that each step has room for drafts however fast adapters load."""
    asked = Asked()
    for at in range(0, len(requests), 4):
        few = ask(engine, requests[at : at + 4])
        asked.ids |= few.ids
        asked.logprobs |= few.logprobs
        asked.finish |= few.finish
    return asked


@pytest.mark.parametrize("settings", [{}, {"max_step_tokens": 12}, FEW_BLOCKS], ids=["plain", "chunked", "preempted"])
def test_greedy_answers_are_pefts(tiny: Oracle, repetitive: list[np.ndarray], settings: dict[str, Any]) -> None:
    engine = tiny.engine(**SPECULATING | settings)
    warm(engine, tiny.names)
    asked = ask(
        engine,
        [
            greedy_request(f"{name}/{i}", name, repetitive[(i + k) % 5], NUM_TOKENS)
            for k, name in enumerate(tiny.names)
            for i in range(2)
        ],
    )
    for k, name in enumerate(tiny.names):
        for i in range(2):
            assert asked.ids[f"{name}/{i}"] == tiny.greedy(name, repetitive[(i + k) % 5], NUM_TOKENS), name
    counters = engine.counters
    assert 0 < counters.num_accepted_tokens < counters.num_drafted_tokens
    assert counters.num_output_tokens == 2 * NUM_TOKENS * len(tiny.names)
    assert (counters.num_preemptions > 0) == (settings is FEW_BLOCKS)


def test_drawn_and_penalised_answers_are_those_without_drafts(tiny: Oracle, repetitive: list[np.ndarray]) -> None:
    ways: list[dict[str, Any]] = [
        {"temperature": 0.3},
        {"temperature": 0.5, "top_p": 0.8, "num_logprobs": 2},
        {"temperature": 0.0, "repetition_penalty": 1.05, "num_logprobs": 3},
        {"temperature": 0.0, "frequency_penalty": 0.2, "min_tokens": 30, "ignore_eos": False},
        {"temperature": 0.2, "presence_penalty": 0.1},
    ]
    requests = [
        EngineRequest(
            str(i), 1, tiny.names[i % len(tiny.names)], repetitive[i % 5],
            Sampling(**{"seed": i, "ignore_eos": True} | ways[i % 5]), NUM_TOKENS,
            stop_token_ids=[int(t) for t in range(0, TINY_VOCAB, 9)] if i % 5 == 3 else [],
        )
        for i in range(30)
    ]  # fmt: skip
    plain, speculating = tiny.engine(), tiny.engine(**SPECULATING)
    warm(speculating, tiny.names)
    expected, asked = ask(plain, requests), ask_few(speculating, requests)
    assert asked.ids == expected.ids
    assert {rid: output.finish for rid, output in asked.finish.items()} == {
        rid: output.finish for rid, output in expected.finish.items()
    }
    assert {output.finish for output in asked.finish.values()} == {"stop", "length"}
    for rid, record in expected.logprobs.items():
        assert len(asked.logprobs[rid]) == len(record)
        assert np.allclose(np.frombuffer(asked.logprobs[rid], "<f4"), np.frombuffer(record, "<f4"), atol=1e-4)
    assert speculating.counters.num_accepted_tokens > 0
    assert speculating.counters.num_steps < plain.counters.num_steps * 8  # at most 8 of 64 run at once
    assert plain.counters.num_drafted_tokens == 0


def test_a_request_resumed_in_the_middle_goes_on_exactly(tiny: Oracle, repetitive: list[np.ndarray]) -> None:
    request = greedy_request("r", "a2", repetitive[3], NUM_TOKENS)
    whole = tiny.greedy("a2", repetitive[3], NUM_TOKENS)
    for cut in (1, 13, NUM_TOKENS - 1):
        engine = tiny.engine(**SPECULATING)
        assert ask(engine, [replace(request, output=whole[:cut])]).ids["r"] == whole[cut:]


def test_cached_blocks_hold_no_wrong_draft(tiny: Oracle, repetitive: list[np.ndarray]) -> None:
    """Prompts that begin with an earlier output use its blocks in the prefix cache."""
    engine = tiny.engine(**SPECULATING)
    warm(engine, tiny.names)
    first = ask_few(engine, [greedy_request(name, name, repetitive[4], NUM_TOKENS) for name in tiny.names]).ids
    assert 0 < engine.counters.num_accepted_tokens < engine.counters.num_drafted_tokens
    before = engine.counters.num_cached_tokens
    longer = {name: np.concatenate((repetitive[4], ids)).astype(np.int32) for name, ids in first.items()}
    second = ask(engine, [greedy_request(name, name, prompt, 8) for name, prompt in longer.items()]).ids
    assert engine.counters.num_cached_tokens - before >= 64 * len(longer)
    for name, prompt in longer.items():
        assert second[name] == tiny.greedy(name, prompt, 8), name
