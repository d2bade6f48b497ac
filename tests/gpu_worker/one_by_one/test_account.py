"""Unbatched models: the memory that a model's own cache takes, and how many caches fit."""

from __future__ import annotations

import pytest

from gpu_worker.one_by_one.account import Account, passes_of
from protocol.wire.errors import BadRequest


@pytest.mark.parametrize(
    ("sizes", "account"),
    [
        ([(16, 1600), (64, 6400)], Account(100, 0)),
        ([(16, 500), (64, 500)], Account(0, 500)),
        ([(16, 2100), (64, 6900)], Account(100, 500)),
        ([(16, 1600), (64, 1000)], Account(0, 1600)),
        ([(10, 100), (20, 205)], Account(11, 0)),
        ([(16, 1600), (64, 6400), (17, 2200)], Account(100, 500)),
    ],
    ids=["keys and values", "a state", "both", "a window that is exceeded", "rounded up", "more after one token"],
)
def test_no_measured_cache_exceeds_its_account(sizes: list[tuple[int, int]], account: Account) -> None:
    assert Account.through(*sizes) == account
    assert all(account.sequence_bytes + num * account.token_bytes >= size for num, size in sizes)


def test_states_take_half_of_the_memory_at_most() -> None:
    assert Account(10, 100).num_places(2000, 64) == 10
    assert Account(10, 100).num_places(2000, 4) == 4
    assert Account(10, 0).num_places(1, 64) == 64
    with pytest.raises(BadRequest, match="kv_cache_bytes is 199, of which half is less than a sequence's 100 bytes"):
        Account(10, 100).num_places(199, 64)


def test_passes_cover_what_is_to_be_computed() -> None:
    assert passes_of("chunks", 0, 40, is_wanted=False) == [(0, 40)]
    assert passes_of("chunks", 40, 60, is_wanted=True) == [(40, 60)]
    assert passes_of("tokens", 0, 40, is_wanted=False) == [(0, 40)], "the first chunk is one pass"
    assert passes_of("tokens", 40, 42, is_wanted=True) == [(40, 41), (41, 42)]
    assert passes_of("nothing", 40, 60, is_wanted=True) == [(0, 60)]
    assert passes_of("nothing", 40, 60, is_wanted=False) == []
