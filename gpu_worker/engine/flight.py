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
    """A step whose forward pass was launched, but whose sampling was not."""

    plan: StepPlan
    work: StepWork
    inputs: StepInputs
    logits: Tensor  # [n, V], for the rows that `inputs` lists
    started_s: float  # start time by time.perf_counter


@dataclass(frozen=True, slots=True)
class Flight:
    """A step whose tokens are being chosen on the device or copied to the host."""

    plan: StepPlan
    work: StepWork
    started_s: float
    ready: list[Sequence]  # sequences that receive a token
    sample: PendingSample | None  # one row per sequence and one per draft token; None if no sequence is ready
    end: Arriving  # complete when the step is computed

    @property
    def ids(self) -> Tensor | None:
        """The tokens on the device, int64 [n]; None if no sequence is ready."""
        return None if self.sample is None else self.sample.ids

    def wait(self) -> Sampled | None:
        """Wait until the tokens are on the host, and return them."""
        self.end.wait()
        return None if self.sample is None else self.sample.result()
