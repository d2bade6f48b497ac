"""A step between its launch and the arrival of its tokens on the host."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gpu_worker.engine.runner import StepInputs
from gpu_worker.engine.step_model import StepWork
from gpu_worker.memory import Arriving
from gpu_worker.planning.sequence import Sequence
from gpu_worker.planning.step_plan import StepPlan
from gpu_worker.sampling.sampling import PendingSample, Sampled


@dataclass(frozen=True, slots=True)
class Launched:
    """A step whose forward pass was launched, and whose tokens are not being chosen yet."""

    plan: StepPlan
    work: StepWork
    inputs: StepInputs
    logits: Tensor  # [n, V], of the rows that the inputs name
    started_s: float  # start time by time.perf_counter


@dataclass(frozen=True, slots=True)
class Flight:
    """A step whose tokens are being chosen on the device, or on their way to the host."""

    plan: StepPlan
    work: StepWork
    started_s: float
    ready: list[Sequence]  # sequences that get a token
    sample: PendingSample | None  # one row of each, and one of each draft token; None where no sequence is ready
    end: Arriving  # arrives when the step is computed

    @property
    def ids(self) -> Tensor | None:
        """The tokens on the device, int64 [n]; None where there are none."""
        return None if self.sample is None else self.sample.ids

    def wait(self) -> Sampled | None:
        """Return the tokens, as soon as they are on the host."""
        self.end.wait()
        return None if self.sample is None else self.sample.result()
