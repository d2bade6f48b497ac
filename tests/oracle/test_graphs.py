"""Recorded decode steps give the tokens of the untouched model in any replay: mixed, padded, after preemption."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from oracle.peft_oracle import TINY_VOCAB, Lora, Oracle, ask, greedy_request, prompts, tiny_llama, warm
from oracle.recorders import Rerun, Tape
from oracle.test_stack import stacks

from gpu_worker.build import warm_up
from gpu_worker.cuda.graphs import Unrecordable, graph_sizes
from gpu_worker.engine.engine import Engine
from lora_kernels import cpu

NATIVE = pytest.mark.skipif(not cpu.load(), reason="no native kernels: the reference reads its lists on the host")
RECORDERS = [pytest.param(Rerun, "reference"), pytest.param(Tape, "auto", marks=NATIVE)]
FEW_BLOCKS = {"kv_cache_bytes": 9 * 16 * 512, "max_model_len": 96}


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    loras = {"one": Lora(3), "two": Lora(16, ("q_proj", "v_proj", "lm_head")), "three": Lora(40, ("down_proj",))}
    return Oracle(tiny_llama(), loras, scale=0.4)


def lengths(oracle: Oracle) -> dict[str, tuple[str, np.ndarray, int]]:
    """Return requests by id: adapter, prompt, and number of tokens, all different so that every batch size occurs."""
    asked = prompts(4, TINY_VOCAB, (5, 33, 20, 12))
    return {
        f"{name}/{i}": (name, prompt, 3 + 3 * (4 * n + i))
        for n, name in enumerate(oracle.names)
        for i, prompt in enumerate(asked)
    }


@pytest.fixture(scope="module")
def expected(oracle: Oracle) -> dict[str, list[int]]:
    return {rid: oracle.greedy(*wanted) for rid, wanted in lengths(oracle).items()}


def recorded(oracle: Oracle, recorder: Rerun, kernels: str, *, mixed: bool = False, **settings: Any) -> Engine:
    engine = oracle.engine(kernels=kernels, **settings)
    for stack in stacks(engine):
        stack._stack = None  # run layer by layer: a tape records operators, and the one native call is none
    limits = engine.config.limits
    most_tokens = limits.max_step_tokens if mixed else 0
    engine.runner.record(recorder, limits.max_num_seqs, engine.config.max_model_len, most_tokens)
    warm(engine, oracle.names)
    return engine


@pytest.mark.parametrize(("recorder", "kernels"), RECORDERS)
@pytest.mark.parametrize(
    "settings", [{}, {"max_num_seqs": 9, "max_step_tokens": 24}, FEW_BLOCKS, {"overlap": "on"}], ids=str
)
def test_replayed_steps_equal_one_by_one(
    oracle: Oracle, expected: dict[str, list[int]], recorder: type[Rerun], kernels: str, settings: dict[str, Any]
) -> None:
    recordings = recorder()
    sizes: dict[str, Any] = {"max_num_seqs": 16, **settings}
    engine = recorded(oracle, recordings, kernels, **sizes)
    requests = [greedy_request(rid, *wanted) for rid, wanted in lengths(oracle).items()]
    asked = ask(engine, requests)
    assert asked.ids == expected
    for rid, (name, prompt, num) in lengths(oracle).items():
        assert not name or expected[rid] != oracle.greedy("", prompt, num), "the adapter must change the answer"
    num_replays = sum(recordings.num_replays)
    assert 0 < num_replays < engine.counters.num_steps, "decodes are replayed, prompts are not"
    assert np.count_nonzero(recordings.num_replays) > 2, "batches of several sizes"
    assert (engine.counters.num_preemptions > 0) == (settings is FEW_BLOCKS)


@pytest.mark.parametrize(("recorder", "kernels"), RECORDERS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_seqs": 9, "max_step_tokens": 24, "overlap": "on"}, FEW_BLOCKS, {"max_draft_tokens": 4}],
    ids=str,
)
def test_steps_with_prompts_are_replayed_too(
    oracle: Oracle, expected: dict[str, list[int]], recorder: type[Rerun], kernels: str, settings: dict[str, Any]
) -> None:
    recordings = recorder()
    sizes: dict[str, Any] = {"max_num_seqs": 16, **settings}
    engine = recorded(oracle, recordings, kernels, mixed=True, **sizes)
    asked = ask(engine, [greedy_request(rid, *wanted) for rid, wanted in lengths(oracle).items()])
    assert asked.ids == expected
    assert sum(recordings.num_replays) == engine.counters.num_steps, "every one of them"
    assert (engine.counters.num_preemptions > 0) == (settings is FEW_BLOCKS)
    assert (engine.counters.num_drafted_tokens > 0) == ("max_draft_tokens" in settings)


@pytest.mark.parametrize(("recorder", "kernels"), RECORDERS)
def test_a_batch_of_the_base_model_alone_replays_what_has_no_adapter_work(
    oracle: Oracle, expected: dict[str, list[int]], recorder: type[Rerun], kernels: str
) -> None:
    recordings = recorder()
    engine = recorded(oracle, recordings, kernels, max_num_seqs=4)
    assert len(recordings.num_replays) == 2 * len(graph_sizes(4)), "with adapters and without, of each size"
    for name in ("", "two", ""):
        before = list(recordings.num_replays)
        rid = f"{name}/1"
        asked = ask(engine, [greedy_request(rid, *lengths(oracle)[rid])])
        assert asked.ids[rid] == expected[rid]
        used = np.flatnonzero(np.subtract(recordings.num_replays, before))
        assert len(used) == 1
        assert used[0] % 2 == (0 if name else 1)  # for each size, the graph with adapters is recorded first


@pytest.mark.parametrize(("recorder", "kernels"), RECORDERS)
def test_padding_touches_no_block_of_anybody(oracle: Oracle, recorder: type[Rerun], kernels: str) -> None:
    """In a replay of four rows with three sequences, only their cache slots and the dummy's change."""
    engine = recorded(oracle, recorder(), kernels, max_num_seqs=4, kv_cache_bytes=64 * 16 * 512)
    num_blocks = engine.config.num_blocks
    for layer in engine.model.layers:
        for cache in (layer.k_cache, layer.v_cache):
            assert cache is not None
            assert len(cache) == num_blocks + 1
            cache.fill_(torch.pi)
    wanted = {rid: lengths(oracle)[f"{rid}/0"] for rid in ("", "one", "two")}
    ask(engine, [greedy_request(rid, name, prompt, 5) for rid, (name, prompt, _) in wanted.items()])
    num_written = sum(len(prompt) + 4 for _, prompt, _ in wanted.values())
    for layer in engine.model.layers:
        assert layer.k_cache is not None
        written = (layer.k_cache[:num_blocks] != torch.pi).any(dim=(1, 3)).sum()
        assert written == num_written


@pytest.mark.parametrize("kernels", ["reference", pytest.param("auto", marks=NATIVE)])
def test_the_steps_before_the_first_request_leave_no_trace(
    oracle: Oracle, expected: dict[str, list[int]], kernels: str
) -> None:
    engine = oracle.engine(kernels=kernels, max_num_seqs=6, max_step_tokens=80, kv_cache_bytes=64 * 16 * 512)
    caches = [cache for layer in engine.model.layers for cache in (layer.k_cache, layer.v_cache) if cache is not None]
    for cache in caches:
        cache.fill_(torch.pi)
    warm_up(engine)
    for cache in caches:
        assert (cache[:-1] == torch.pi).all()
        assert (cache[-1] != torch.pi).all(), "the dummy block alone"
    requests = [greedy_request(rid, *wanted) for rid, wanted in lengths(oracle).items()]
    assert ask(engine, requests).ids == expected


@pytest.mark.parametrize(("recorder", "kernels"), RECORDERS)
def test_steps_whose_adapters_do_more_than_lora_run_as_they_are(recorder: type[Rerun], kernels: str) -> None:
    oracle = Oracle(tiny_llama(), {"one": Lora(3), "dora": Lora(5, options={"use_dora": True})}, scale=0.4)
    recordings = recorder()
    engine = recorded(oracle, recordings, kernels, max_num_seqs=4)
    prompt = prompts(1, TINY_VOCAB)[0]
    nums = {"dora": 5, "one": 9, "": 9}
    asked = ask(engine, [greedy_request(name, name, prompt, num) for name, num in nums.items()])
    expected = {name: oracle.greedy(name, prompt, num) for name, num in nums.items()}
    assert asked.ids == expected
    assert expected["one"][:5] != expected["dora"] != expected[""][:5]
    assert sum(recordings.num_replays) == 9 - 5, "from the end of the one with DoRA on"


@NATIVE
def test_a_step_that_reads_from_the_device_cannot_be_recorded(oracle: Oracle) -> None:
    """The tape detects what makes a capture fail. The norm here reads a value from the device."""
    engine = oracle.engine(max_num_seqs=2)
    engine.model.plain = None  # on a CPU it is one operation
    norm = engine.model.module.get_submodule("model.norm")
    compute = norm.forward
    norm.forward = lambda x: compute(x * x.sum().item())
    with pytest.raises(Unrecordable):
        engine.runner.record(Tape(), 2, 32)
