"""Drafts by prompt lookup repeat the last occurrence of the same tokens, and get shorter where they are wrong."""

from __future__ import annotations

import numpy as np
import pytest

from gpu_worker.planning.speculation import MAX_PAUSE, Drafter


def tokens(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


def test_a_match_of_three_tokens_is_preferred_to_one_of_two() -> None:
    text = tokens(1, 2, 3, 40, 41, 9, 2, 3, 50, 51, 1, 2, 3)
    assert Drafter(8).propose(text, 8) == [40, 41, 9, 2]


def test_the_last_occurrence_counts() -> None:
    assert Drafter(8).propose(tokens(7, 8, 1, 2, 7, 8, 3, 4, 7, 8), 2) == [3, 4]


def test_nothing_is_drafted_of_a_text_without_repetition() -> None:
    assert Drafter(8).propose(tokens(*range(50)), 8) == []
    assert Drafter(8).propose(tokens(1), 8) == []


def test_a_loop_goes_on() -> None:
    assert Drafter(8).propose(tokens(5, 6, 7, 5, 6, 7, 5, 6), 4) == [7, 5, 6, 7]
    assert Drafter(8).propose(tokens(4, 4, 4), 4) == [4, 4, 4, 4]


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_the_limit_holds(limit: int) -> None:
    assert len(Drafter(8).propose(tokens(4, 4, 4, 4), limit)) == limit


def test_growing_texts_are_indexed_as_whole_ones() -> None:
    rng = np.random.default_rng(0)
    text = rng.integers(4, size=200).astype(np.int32)
    growing = Drafter(8)
    for end in range(1, len(text) + 1):
        assert growing.propose(text[:end], 4) == Drafter(8).propose(text[:end], 4)


def test_right_drafts_make_more_and_wrong_ones_fewer() -> None:
    text, drafter = tokens(*[4] * 20), Drafter(16)
    assert len(drafter.propose(text, 99)) == 4
    drafter.learn(4, 4)
    assert len(drafter.propose(text, 99)) == 8
    drafter.learn(8, 2)
    assert len(drafter.propose(text, 99)) == 3
    for _ in range(9):
        drafter.learn(1, 1)
    assert len(drafter.propose(text, 99)) == 16


def test_wrong_drafts_bring_ever_longer_pauses_that_end() -> None:
    text, drafter = tokens(*[4] * 20), Drafter(8)
    pauses: list[int] = []
    for _ in range(8):
        num_drafted = len(drafter.propose(text, 8))
        drafter.learn(num_drafted, 0)
        pause = 0
        while drafter._rest:
            assert drafter.propose(text, 8) == []
            pause += 1
        pauses.append(pause)
    assert pauses == sorted(pauses)
    assert pauses[:3] == [1, 3, 7]
    assert pauses[-1] == MAX_PAUSE
