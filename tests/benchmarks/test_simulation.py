"""The simulated fleet: how long requests and adapters take in virtual time, and the command that compares policies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.simulation.__main__ import main
from benchmarks.simulation.load import adapters
from benchmarks.simulation.policies import POLICIES, make_dispatcher
from benchmarks.simulation.run import Arrival, Simulation, SimulationResult, jain
from benchmarks.simulation.worker import SimulatedRequest, WorkerModel
from protocol.wire import messages as m
from scheduler.config import SchedulerConfig
from tests.scheduler.fakes import make_submit

FACTS = adapters(1)


def arrival(rid: str, at_ms: float, output: int, **more: Any) -> Arrival:
    return Arrival(at_ms, make_submit(rid, max_new_tokens=200, deadline_ms=1 << 50, **more), output)


def simulate(trace: list[Arrival], model: WorkerModel) -> SimulationResult:
    return Simulation(make_dispatcher(POLICIES[0], SchedulerConfig(), FACTS), model, 1, FACTS).run(trace)


def test_a_simulated_request_takes_what_its_steps_take() -> None:
    model = WorkerModel(step=m.StepModel(a=0.01, b=0.001), max_step_tokens=64)
    (only,) = simulate([arrival("r", 100.0, num_prompt_tokens=100, output=3)], model).requests
    assert only.first_ms - 100.0 == pytest.approx((10 + 64) + (10 + 36))
    assert only.ended_ms - only.first_ms == pytest.approx(2 * 11)


def test_a_simulated_adapter_takes_what_its_bytes_take() -> None:
    free = m.StepModel(a=0.0, b=0.0)
    trace = [arrival("first", 0.0, digest="a0", output=1), arrival("second", 1000.0, digest="a0", output=1)]
    outcome = simulate(trace, WorkerModel(step=free))
    size = FACTS["a0"].num_bytes
    first, second = outcome.requests
    assert first.first_ms == pytest.approx(10 + size / 2e5 + 1 + size / 2e6)
    assert second.first_ms == 1000.0
    assert (outcome.num_loads, outcome.num_fetches) == (1, 1)


def test_attained_tokens_are_counted_within_a_window() -> None:
    outcome = SimulationResult()
    sub = make_submit("r", tenant="t", num_prompt_tokens=10)
    outcome.requests.append(SimulatedRequest(sub, 100, first_ms=100.0, ended_ms=200.0))
    assert outcome.attained(0.0, 1000.0) == {"t": 210.0}
    assert outcome.attained(150.0, 1000.0) == {"t": 100.0}
    assert jain([1.0, 1.0]) == 1.0
    assert jain([1.0, 0.0]) == 0.5
    assert jain([0.0, 0.0]) == 1.0


def test_the_command_prints_and_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    policies = ["affinity+fairness", "round-robin"]
    main(["--workers", "1", "2", "--seconds", "3", "--policies", *policies, "--json", str(out)])
    rows = json.loads(out.read_text())
    assert [(row["policy"], row["workers"]) for row in rows] == [(name, num) for num in (1, 2) for name in policies]
    assert all(row["requests"] > 0 and row["output_tokens_per_s"] > 0 for row in rows)
    assert "round-robin" in capsys.readouterr().out
