"""Steps launched before the previous step's tokens are known: their order, and requests that end or leave meanwhile."""

from __future__ import annotations

from dataclasses import replace

import pytest
from oracle.peft_oracle import TINY_VOCAB, Lora, Oracle, ask, greedy_request, prompts, tiny_llama, warm, watch
from oracle.tiny_models import tiny_model

from gpu_worker.engine.engine import Engine
from gpu_worker.engine.step_model import Phase
from protocol.wire.errors import BadRequest


@pytest.fixture(scope="module")
def tiny() -> Oracle:
    return Oracle(tiny_llama(), {"x8": Lora(8)}, scale=0.3)


def launches_of(engine: Engine) -> list[int]:
    """Return a list to which each launch appends how many tokens it will return."""
    launches: list[int] = []
    watch(engine, lambda inputs, _: launches.append(len(inputs.ready)))
    return launches


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_a_step_is_launched_before_the_tokens_before_are_here(tiny: Oracle, overlap: str) -> None:
    engine, [prompt] = tiny.engine(overlap=overlap), prompts(1, TINY_VOCAB)
    phases: list[Phase] = []
    lap = engine.meter.lap

    def watched(phase: Phase) -> None:
        phases.append(phase)
        lap(phase)

    engine.meter.lap = watched
    steps: list[list[Phase]] = []

    def keep(_: int) -> None:
        steps.append([*phases])
        phases.clear()

    asked = ask(engine, [greedy_request("x", "", prompt, 4)], keep)
    assert asked.ids["x"] == tiny.greedy("", prompt, 4)
    launch: list[Phase] = ["plan", "inputs", "forward"]
    choose: list[Phase] = ["sample"]
    land: list[Phase] = ["sample", "finish"]
    serial = [launch + choose + land] * 4
    overlapped = [launch + choose, *[launch + land + choose] * 3, land]
    assert steps == (overlapped if overlap == "on" else serial), "and none is launched behind the last token"
    assert engine.counters.num_steps == engine.counters.num_output_tokens == 4


def test_who_ends_by_a_token_leaves_the_step_launched_behind(tiny: Oracle) -> None:
    engine, both = tiny.engine(overlap="on"), prompts(2, TINY_VOCAB)
    warm(engine, ["x8"])
    launches = launches_of(engine)
    whole = tiny.greedy("x8", both[0], 12)
    stop = whole[5]
    assert whole.index(stop) == 5
    requests = [
        greedy_request("short", "x8", both[0], 12, stop_token_ids=[stop]), greedy_request("long", "", both[1], 12),
    ]  # fmt: skip
    asked = ask(engine, requests)
    assert (asked.ids["short"], asked.finish["short"].finish) == (whole[:6], "stop")
    assert asked.ids["long"] == tiny.greedy("", both[1], 12)
    assert launches.count(2) == 7, "one more than tokens of the shorter one: launched before its end was known"
    assert engine.counters.num_output_tokens == 6 + 12


def test_who_leaves_with_a_token_in_flight_can_come_back(tiny: Oracle) -> None:
    engine, both = tiny.engine(overlap="on"), prompts(2, TINY_VOCAB)
    engine.add(greedy_request("x", "", both[0], 9))
    engine.add(greedy_request("y", "", both[1], 9))
    outputs = [output for _ in range(3) for output in engine.step()]
    known = [id_ for output in outputs if output.rid == "x" for id_ in output.ids]
    assert known == tiny.greedy("", both[0], 2), "the third is in flight"
    engine.cancel("y")
    newer = replace(greedy_request("x", "", both[0], 9, output=known), epoch=2)
    asked = ask(engine, [newer])
    assert asked.ids == {"x": tiny.greedy("", both[0], 9)[2:]}
    assert asked.finish["x"].epoch == 2
    engine.add(greedy_request("z", "", both[1], 9))
    engine.step()
    assert engine.hand_over() == ["z"]
    engine.step()
    assert not engine.can_step
    engine.check_integrity()
    assert engine.blocks.num_free == engine.blocks.num_blocks


def test_an_error_with_a_token_in_flight_follows_what_is_known(tiny: Oracle) -> None:
    engine, [prompt] = tiny.engine(overlap="on"), prompts(1, TINY_VOCAB)
    engine.add(greedy_request("x", "", prompt, 9))
    known = [output for _ in range(3) for output in engine.step()]
    engine._fail_waiting("x", BadRequest("it cannot go on"))
    [end] = engine.step()
    assert (end.finish, end.ids, end.seq0) == ("error", [], len(known))
    assert not engine.has_work


def test_where_steps_cannot_overlap_the_setting_says_so(tiny: Oracle) -> None:
    with pytest.raises(BadRequest, match="overlap is on, but max_draft_tokens is 4"):
        tiny.engine(overlap="on", max_draft_tokens=4)
    assert not tiny.engine(max_draft_tokens=4).config.overlaps
    assert not tiny.engine().config.overlaps, "on a CPU each token would come a step later"
    alone = Oracle(tiny_model("qwen3_5_text"), {}, scale=0.4)
    assert alone.engine(overlap="on").config.overlaps
