"""Greedy tokens of the base and 16 adapters, all in one engine at once, equal Hugging Face's and PEFT's alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from oracle.peft_oracle import (
    TINY_VOCAB,
    Asked,
    Lora,
    Oracle,
    ask,
    greedy_request,
    prompts,
    random_llama,
    sixteen_loras,
    tiny_llama,
    warm,
)

NUM_TOKENS = 24
FEW_BLOCKS = {"kv_cache_bytes": 30 * 16 * 512, "max_model_len": 96}


@pytest.fixture(scope="module")
def asked_prompts(tiny: Oracle) -> dict[str, list[np.ndarray]]:
    """Return two prompts per adapter, out of five in total: only the adapter keeps their cached prefixes apart."""
    shared = prompts(5, TINY_VOCAB)
    return {name: [shared[i % 5], shared[(i + 2) % 5]] for i, name in enumerate(tiny.names)}


@pytest.fixture(scope="module")
def expected(tiny: Oracle, asked_prompts: dict[str, list[np.ndarray]]) -> dict[str, list[list[int]]]:
    return {name: [tiny.greedy(name, prompt, NUM_TOKENS) for prompt in both] for name, both in asked_prompts.items()}


def test_every_adapter_changes_the_answer(
    tiny: Oracle, asked_prompts: dict[str, list[np.ndarray]], expected: dict[str, list[list[int]]]
) -> None:
    for name, both in asked_prompts.items():
        if name:
            assert expected[name] != [tiny.greedy("", prompt, NUM_TOKENS) for prompt in both], name


@pytest.mark.parametrize(
    ("settings", "chunked", "preempted"),
    [
        ({"prefix_cache": False}, False, False),
        ({}, False, False),
        ({"prefix_cache": False, "max_step_tokens": 40, "max_num_seqs": 40}, True, False),
        ({"max_step_tokens": 40, "max_num_seqs": 40}, True, False),
        ({"prefix_cache": False, **FEW_BLOCKS}, False, True),
        ({"kernels": "reference"}, False, False),
        ({"max_step_tokens": 64, **FEW_BLOCKS}, True, True),
        ({"overlap": "on"}, False, False),
        ({"overlap": "on", "max_step_tokens": 64, **FEW_BLOCKS}, True, True),
    ],
    ids=[
        "plain", "prefix", "chunked", "prefix-chunked", "preempted", "reference", "all", "overlapped", "overlapped-all",
    ],
)  # fmt: skip
def test_a_mixed_batch_equals_one_by_one(
    tiny: Oracle,
    asked_prompts: dict[str, list[np.ndarray]],
    expected: dict[str, list[list[int]]],
    settings: dict[str, Any],
    chunked: bool,
    preempted: bool,
) -> None:
    engine = tiny.engine(**settings)
    warm(engine, tiny.names)
    most_tokens = max(len(prompt) for both in asked_prompts.values() for prompt in both)
    prefix_cache = settings.get("prefix_cache", True)

    def ask_all() -> Asked:
        requests = [
            greedy_request(f"{name}/{i}", name, prompt, NUM_TOKENS)
            for name, both in asked_prompts.items()
            for i, prompt in enumerate(both)
        ]
        asked = ask(engine, requests)
        for name in tiny.names:
            assert [asked.ids[f"{name}/{i}"] for i in range(2)] == expected[name], name
        return asked

    asked = ask_all()
    if prefix_cache:
        asked = ask_all()
    counters = engine.counters
    assert (counters.num_cached_tokens > 0) == prefix_cache
    assert (engine.config.limits.max_step_tokens < most_tokens) == chunked
    assert (counters.num_preemptions > 0) == preempted
    assert asked.most_adapters_in_a_step > (3 if preempted else 8)


def test_who_loses_its_place_to_others_says_the_same(
    tiny: Oracle, asked_prompts: dict[str, list[np.ndarray]], expected: dict[str, list[list[int]]]
) -> None:
    engine = tiny.engine(max_num_seqs=4, max_step_tokens=64)
    warm(engine, tiny.names)
    flood, quiet = (
        [greedy_request(f"{name}/{i}", name, both[i], NUM_TOKENS, yields=not i) for name, both in asked_prompts.items()]
        for i in range(2)
    )

    def let_some_in(num_steps: int) -> None:
        """Add as many requests as can run at once; in between, those that yield get the slots back."""
        if num_steps % 40 == 12:
            for _ in range(min(4, len(quiet))):
                engine.add(quiet.pop())

    asked = ask(engine, flood, let_some_in)
    assert not quiet
    assert engine.counters.num_preemptions > len(tiny.names) // 2
    for name in tiny.names:
        assert [asked.ids[f"{name}/{i}"] for i in range(2)] == expected[name], name


def test_64_adapters_run_in_one_batch() -> None:
    loras = {f"x{i}": Lora(rank=1 + i % 4, targets=("q_proj", "v_proj")) for i in range(64)}
    oracle = Oracle(tiny_llama(), loras, scale=0.5)
    prompt = prompts(1, TINY_VOCAB, (6,))[0]
    engine = oracle.engine()
    warm(engine, oracle.names)
    asked = ask(engine, [greedy_request(name, name, prompt, 8) for name in oracle.names[1:]])
    assert asked.most_adapters_in_a_step == 64
    for name in oracle.names[1:]:
        assert asked.ids[name] == oracle.greedy(name, prompt, 8), name
    assert len({tuple(ids) for ids in asked.ids.values()}) == 64


def test_a_model_of_smollm2s_width_too() -> None:
    """12 layers of width 576 with 9 heads over 3, as in SmolLM2-135M, with random weights."""
    base = random_llama(
        std=0.06, vocab_size=8192, hidden_size=576, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    oracle = Oracle(base, sixteen_loras(head=False), scale=0.1)
    both = prompts(2, 8192, (21, 9))
    expected = {name: oracle.greedy(name, both[i % 2], 4) for i, name in enumerate(oracle.names)}
    without = [oracle.greedy("", prompt, 4) for prompt in both]
    engine = oracle.engine(adapter_pool_bytes=1 << 30)
    warm(engine, oracle.names)
    asked = ask(engine, [greedy_request(name, name, both[i % 2], 4) for i, name in enumerate(oracle.names)])
    for i, name in enumerate(oracle.names):
        assert asked.ids[name] == expected[name], name
        assert not name or expected[name] != without[i % 2], name
    assert asked.most_adapters_in_a_step == 16
