"""A simulated day of swaps: the cost of a swap, and a comparison of the policies on a small case."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.simulation import swapping
from benchmarks.simulation.swapping import FLOOD, POLICIES, Cell, Day, Request, arrivals, lines, row

ONE = Cell(bases=2, workers=1, kind="steady", load=0.5, hours=0.01)


def asked(*requests: tuple[float, str]) -> list[Request]:
    """Return requests of one second each, from pairs of arrival time, s, and base."""
    return [Request(at_s, base, "t", 1.0, 1.0) for at_s, base in requests]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_request_for_another_base_waits_for_the_swap(policy: str) -> None:
    outcome = Day(ONE, policy).run(iter(asked((0.25, "b0"), (0.5, "b1"))))
    late_s = 0.25 if policy == "swaps" else 0.0  # until the next decision, at 1.5 s
    assert outcome.waits_s == pytest.approx([0.0, 0.75 + late_s + ONE.start_s("b1")])
    assert outcome.swaps.total() == 1
    assert outcome.starting_s == ONE.start_s("b1")


@pytest.mark.parametrize(("policy", "num"), [("fifo", 3), ("collate", 1), ("swaps", 1)])
def test_requests_of_a_base_are_served_together_but_by_fifo(policy: str, num: int) -> None:
    trace = asked((0.1, "b0"), (0.2, "b1"), (0.3, "b0"), (0.4, "b1"))
    assert Day(ONE, policy).run(iter(trace)).swaps.total() == num


@pytest.mark.parametrize("policy", POLICIES)
def test_a_batch_takes_longer_than_one_and_less_than_one_after_the_other(policy: str) -> None:
    cell = replace(ONE, slots=2)
    outcome = Day(cell, policy).run(iter(asked((0.0, "b0"), (0.0, "b0"), (0.0, "b0"))))
    assert outcome.waits_s == pytest.approx([0.0, 0.0, 1.0 + swapping.STEP_GROWTH])
    assert sorted(cell.speed for cell in (ONE, cell)) == pytest.approx([1.0, 2 / (1.0 + swapping.STEP_GROWTH)])


@pytest.mark.parametrize(("policy", "num"), [("fifo", 2), ("collate", 2), ("swaps", 3)])
def test_which_requests_do_not_wait_behind_one_for_another_base(policy: str, num: int) -> None:
    trace = asked((0.1, "b0"), (0.2, "b0"), (0.3, "b1"), (0.4, "b0"))
    outcome = Day(replace(ONE, slots=8), policy).run(iter(trace))
    assert sum(waited_s < 1.0 for waited_s in outcome.waits_s) == num


def test_collate_ends_a_batch_to_which_requests_could_be_added_forever() -> None:
    trace = sorted([*((0.5 * i, "b0") for i in range(60)), (10.1, "b1")])
    outcome = Day(replace(ONE, slots=8), "collate").run(iter(asked(*trace)))
    assert outcome.swaps.total() == 2
    assert max(outcome.waits_s) < 10.0


def test_an_interrupted_request_goes_on_from_where_it_was() -> None:
    """The request takes longer than the bound while another base waits."""
    trace = [Request(0.0, "b0", "t", 60.0, 60.0), Request(1.0, "b1", "u", 1.0, 1.0)]
    outcome = Day(ONE, "swaps").run(iter(trace))
    assert outcome.swaps == {"bound": 1, "idle": 1}
    other_s, own_s = outcome.waits_s
    assert 29.0 <= other_s - ONE.start_s("b1") <= 30.0
    between_s = ONE.start_s("b1") + 1.0 + ONE.start_s("b0") + swapping.RESUME_S
    assert between_s <= own_s <= between_s + swapping.TICK_S


def test_beside_a_flood_waits_are_half_of_fifos_each_time() -> None:
    cell = Cell(bases=3, workers=1, kind="flood", load=0.3, hours=0.25)
    fifo, swaps = row(cell, "fifo"), row(cell, "swaps")
    assert swaps == row(cell, "swaps")
    assert len(list(arrivals(cell))) >= swaps["requests_per_h"] * cell.hours >= fifo["requests_per_h"] * cell.hours > 50
    assert swaps["p99_s"] <= fifo["p99_s"] / 2
    assert 0 < swaps["flood"] < 1
    assert all(request.tenant != FLOOD for request in arrivals(cell))


def test_with_batches_waits_are_half_of_fifos_each_time() -> None:
    cell = Cell(bases=3, workers=1, kind="steady", load=0.6, hours=0.25, slots=8)
    fifo, swaps = row(cell, "fifo"), row(cell, "swaps")
    assert swaps["p99_s"] <= fifo["p99_s"] / 2
    assert swaps["requests_per_h"] >= fifo["requests_per_h"] > 0


def test_the_table_says_which_goals_are_reached() -> None:
    def cell(p99_s: float, requests_per_h: int = 100) -> list[dict[str, object]]:
        same = {"bases": 3, "workers": 1, "kind": "day", "load": 0.3}
        shown = {"p50_s": 0, "swaps_per_h": 0, "unused": 0, "longest_s": 0}
        figures = ((10.0, 100), (4.0, 100), (p99_s, requests_per_h))
        return [{**same, **shown, "p99_s": one, "requests_per_h": num} for one, num in figures]

    rows = [*cell(5.0), *cell(5.1), *cell(5.0, 98)]
    assert [line[-1] for line in lines(rows)] == ["5.0: reached", "5.0: missed", "5.0: missed"]
