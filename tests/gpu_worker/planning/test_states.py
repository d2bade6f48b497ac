"""State slots: none is lost or used twice, and none is reused before a step has read it."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest

from gpu_worker.planning.batcher import Batcher, BatchLimits
from gpu_worker.planning.blocks import BlockPool
from gpu_worker.planning.sequence import Sequence
from gpu_worker.planning.states import OUTPUT_TOKENS, PROMPT_TOKENS, StatePool, worth_saving
from protocol.runtime.settings import BLOCK_TOKENS
from tests.gpu_worker.planning.batches import FakeSlots, finish_step, make_seq


def reader_of(pool: StatePool, hash_: bytes) -> Sequence:
    """Return a sequence that is about to read a saved state."""
    seq = make_seq("reader", np.arange(BLOCK_TOKENS + 1), 1)
    seq.hashes = [hash_]
    assert pool.take(seq, 1)
    return seq


def test_the_least_recently_used_state_makes_room() -> None:
    pool = StatePool(3)
    for hash_ in (b"a", b"b"):
        slot = pool.allocate()
        assert slot is not None
        pool.save(hash_, slot)
    pool.complete(reader_of(pool, b"a"), 1, {})
    assert pool.allocate() is not None
    assert pool.longest([b"b"]) == (0, pool.zero)
    assert pool.longest([b"a"])[0] == 1


def test_a_state_that_a_step_reads_is_not_overwritten() -> None:
    pool = StatePool(2)
    slot = pool.allocate()
    assert slot is not None
    pool.save(b"a", slot)
    seq = reader_of(pool, b"a")
    assert pool.allocate() is None
    pool.complete(seq, 0, {})  # the step is undone and will read it again
    assert pool.allocate() is None
    pool.forget(b"a")
    assert pool.longest([b"a"]) == (1, slot)
    pool.complete(seq, 1, {})
    assert pool.allocate() == slot


def test_a_state_outlasts_others_steps_until_its_reader_has_run() -> None:
    """Its reader's mask is late while a long prompt of another request takes all slots for its own states."""
    batcher = Batcher(BatchLimits(2, 600), BlockPool(400), FakeSlots(), "base", StatePool(8))
    states, rng = batcher.states, np.random.default_rng(0)
    assert states is not None
    head = rng.integers(5, 100, 3 * BLOCK_TOKENS)
    first, second = (make_seq(rid, np.append(head, at), 4) for at, rid in enumerate(("first", "second")))
    batcher.add(first)
    finish_step(batcher, batcher.plan())
    batcher.remove(first)
    matcher = mock.Mock(is_filling=False, filling=None)
    second.matcher = matcher
    batcher.add(second)
    plan = batcher.plan()
    assert second.state_read == states.longest(second.hashes)[1] != states.zero
    batcher.postpone(second, plan)
    matcher.is_filling = True
    batcher.complete(plan)
    batcher.add(make_seq("other", rng.integers(5, 100, 2000), 3))
    for _ in range(6):
        finish_step(batcher, batcher.plan())
    matcher.is_filling = False
    assert second in batcher.plan().num_new
    assert states.longest(second.hashes) == (3, second.state_read)


def test_outputs_and_prompts_that_differ_share_no_block() -> None:
    batcher = Batcher(BatchLimits(2, 600), BlockPool(400), FakeSlots(), "base", StatePool(8, saves_outputs=False))
    text = np.arange(6 * BLOCK_TOKENS + 1)
    begun = make_seq("begun", text[: 2 * BLOCK_TOKENS + 1], 99, output=text[2 * BLOCK_TOKENS + 1 :].tolist())
    again = make_seq("again", begun.request.prompt, 99, output=begun.request.output)
    for seq, num_found in ((begun, 0), (make_seq("prompt", text, 1), 2), (make_seq("same", text, 1), 6), (again, 2)):
        batcher.add(seq)
        plan = batcher.plan()
        assert plan.num_cached == num_found * BLOCK_TOKENS, seq.rid
        finish_step(batcher, plan)
        batcher.remove(seq)


def test_a_state_saved_twice_takes_one_slot() -> None:
    pool = StatePool(3)
    for _ in range(2):
        slot = pool.allocate()
        assert slot is not None
        pool.save(b"a", slot)
    pool.check_integrity([])
    held = pool.allocate()
    with pytest.raises(AssertionError, match="lost or held twice"):
        pool.check_integrity([])
    pool.forget(b"a")
    pool.check_integrity([held] if held is not None else [])


def test_the_longest_saved_beginning_is_found() -> None:
    pool = StatePool(4)
    hashes = [f"{i}".encode() for i in range(6)]
    for hash_ in (hashes[1], hashes[3]):
        slot = pool.allocate()
        assert slot is not None
        pool.save(hash_, slot)
    assert pool.longest(hashes)[0] == 4
    assert pool.longest(hashes[:3])[0] == 2
    assert pool.longest(hashes[:1]) == (0, pool.zero)


def test_which_positions_are_worth_a_state() -> None:
    num_prompt = 2 * PROMPT_TOKENS + 40
    last = num_prompt - num_prompt % BLOCK_TOKENS
    assert worth_saving(num_prompt, 0, num_prompt) == [PROMPT_TOKENS, 2 * PROMPT_TOKENS, last]
    assert worth_saving(num_prompt, PROMPT_TOKENS, 2 * PROMPT_TOKENS) == [2 * PROMPT_TOKENS]
    assert worth_saving(BLOCK_TOKENS, 0, BLOCK_TOKENS) == []  # the logits of its last token are needed
    grown = 10 * OUTPUT_TOKENS
    assert worth_saving(20, grown - 1, grown) == [grown]
    assert worth_saving(20, grown - 1, grown, with_output=False) == []
    assert worth_saving(20, grown, grown + 1) == []
