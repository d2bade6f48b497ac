"""The phases of a step's plan, without slots and blocks: which sequence is first, which yields, which waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import pytest

from gpu_worker.planning.policy import BatchLimits, StepPolicy
from gpu_worker.planning.sequence import Sequence
from gpu_worker.planning.step_limit import StepTime
from gpu_worker.planning.step_plan import StepPlan
from protocol.wire.messages import StepModel
from tests.gpu_worker.planning.batches import make_seq

CHEAP = StepModel(a=1.0, b=0.01)
DEAR = StepModel(a=1.0, b=2.0)  # a decode takes longer than an empty step


class AllFits:
    """Queues in which only tokens are scarce: slots and blocks always suffice."""

    def __init__(self, *seqs: Sequence, model: StepModel = CHEAP) -> None:
        self.running = [seq for seq in seqs if seq.num_computed]
        self.waiting = deque(seq for seq in seqs if not seq.num_computed)
        self.step_model = model

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def run(self, seqs: Iterable[Sequence], plan: StepPlan, time: StepTime | None = None) -> None:
        for seq in seqs:
            if num_new := min(seq.num_pending, plan.budget):
                plan.add(seq, num_new)

    def admit(self, seqs: list[Sequence], plan: StepPlan, time: StepTime | None = None) -> None:
        for seq in seqs:
            self.waiting.remove(seq)
            self.running.append(seq)
        self.run(seqs, plan)

    def time_of(self, plan: StepPlan) -> StepTime:
        raise AssertionError("no step is limited here")


def decode(rid: str, priority: int = 0) -> Sequence:
    seq = prompt(rid, priority, 4)
    seq.num_computed = 3
    return seq


def prompt(rid: str, priority: int = 0, length: int = 20) -> Sequence:
    return make_seq(rid, np.arange(length), 50, yields=priority == 1, batch=priority == 2, tenant=rid)


def fill(policy: StepPolicy, queues: AllFits) -> dict[str, int]:
    plan = StepPlan(budget=policy.limits.max_step_tokens)
    policy.fill(plan, queues)
    return {seq.rid: num_new for seq, num_new in plan.num_new.items()}


@pytest.mark.parametrize(
    ("here", "first", "yielding", "third"),
    [
        ([], "", "", ""), ([0], "0", "", ""), ([1], "", "1", ""), ([2], "", "2", ""), ([0, 1], "0", "1", ""),
        ([0, 2], "0", "2", ""), ([1, 2], "1", "2", ""), ([0, 1, 2], "0", "1", "2"),
    ],
)  # fmt: skip
def test_the_lowest_class_is_first_and_the_next_one_yields(
    here: list[int], first: str, yielding: str, third: str
) -> None:
    policy, seqs = StepPolicy(BatchLimits(4, 64)), [decode(str(priority), priority) for priority in here]
    fill(policy, AllFits(*seqs))
    assert [seq.rid for seq in seqs if policy.is_first(seq)] == list(first)
    assert [seq.rid for seq in seqs if policy.takes_turns(seq)] == list(yielding)
    assert [seq.rid for seq in seqs if not policy.is_first(seq) and not policy.takes_turns(seq)] == list(third)


def test_decodes_come_before_prompts_and_what_yields_last() -> None:
    seqs = [prompt("late", 1), prompt("new"), decode("flood", 1), decode("quiet"), decode("line", 2)]
    taken = fill(StepPolicy(BatchLimits(16, 64)), AllFits(*seqs))
    assert list(taken.items()) == [("quiet", 1), ("flood", 1), ("new", 20), ("late", 10)], "a short step has 32 tokens"


@pytest.mark.parametrize(("model", "pauses"), [(CHEAP, False), (DEAR, True)])
def test_dear_decodes_pause_beside_a_prompt_once(model: StepModel, pauses: bool) -> None:
    policy, flood, quiet = StepPolicy(BatchLimits(8, 16)), decode("flood", 1), decode("quiet")
    queues = AllFits(flood, quiet, prompt("new", 0, 90), model=model)
    taken = ["flood" in fill(policy, queues) for _ in range(4)]
    assert taken == ([False, True, False, True] if pauses else [True] * 4)


def test_batch_work_has_a_step_that_nobody_else_can_use() -> None:
    quiet, flood = prompt("quiet"), prompt("flood", 1)
    policy, queues = StepPolicy(BatchLimits(4, 64)), AllFits(decode("line", 2), quiet, flood)
    queues.waiting.clear()
    queues.running += [quiet, flood]
    for seq in (quiet, flood):
        seq.expected_row, seq.num_tokens = 0, seq.max_tokens  # none of its tokens remains to be computed
    assert fill(policy, queues) == {"line": 1}
    quiet.expected_row = -1
    assert "line" not in fill(policy, queues)
