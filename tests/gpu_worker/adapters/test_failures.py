"""Loads that failed are retried with growing delays; a success resets the delay."""

from __future__ import annotations

import pytest

from gpu_worker.adapters.failures import LoadFailures
from protocol.wire.errors import AdapterRefused, LorafleetError, Unavailable


@pytest.mark.parametrize(
    ("error", "pauses"),
    [(AdapterRefused(["of another base"]), [5, 10, 20, 40]), (Unavailable("no store answers"), [1, 2, 4, 8])],
)
def test_pauses_double_until_a_success(error: LorafleetError, pauses: list[float]) -> None:
    known, now_s = LoadFailures(), 1000.0
    assert known.error("a", now_s) is None
    for pause_s in pauses:
        known.note("a", error, now_s)
        assert known.error("a", now_s + pause_s - 0.01) is error
        assert known.error("b", now_s) is None
        now_s += pause_s
        assert known.error("a", now_s) is None
    known.forget("a")
    known.note("a", error, now_s)
    assert known.error("a", now_s + pauses[0]) is None


def test_the_oldest_are_forgotten() -> None:
    known, error = LoadFailures(max_kept=2), Unavailable("no store answers")
    for digest in ("a", "b", "a", "c"):
        known.note(digest, error, 0.0)
    assert [known.error(digest, 0.5) for digest in "abc"] == [error, None, error]
