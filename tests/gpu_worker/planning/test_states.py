"""State slots: none is lost or used twice, and none is reused before a step has read it."""

from __future__ import annotations

import pytest

from gpu_worker.planning.states import OUTPUT_TOKENS, PROMPT_TOKENS, StatePool, worth_saving
from protocol.runtime.settings import BLOCK_TOKENS


def test_the_least_recently_used_state_makes_room() -> None:
    pool = StatePool(2)
    for hash_ in (b"a", b"b"):
        slot = pool.allocate()
        assert slot is not None
        pool.save(hash_, slot)
    pool.read(b"a")
    pool.end_step()
    assert pool.allocate() is not None
    assert pool.longest([b"b"]) == (0, pool.zero)
    assert pool.longest([b"a"])[0] == 1


def test_a_state_that_a_step_reads_is_not_overwritten() -> None:
    pool = StatePool(1)
    slot = pool.allocate()
    assert slot is not None
    pool.save(b"a", slot)
    pool.read(b"a")
    assert pool.allocate() is None
    pool.forget(b"a")
    assert pool.longest([b"a"]) == (1, slot)
    pool.end_step()
    assert pool.allocate() == slot


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
