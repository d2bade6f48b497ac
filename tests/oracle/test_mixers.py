"""Layers with states against transformers' own: outputs and states of several sequences, in different slots."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.kernel_cases import randn
from oracle.tiny_models import tiny_model
from torch import Tensor, nn
from transformers import DynamicCache

from gpu_worker.layers.blocks import DeltaMixer, stacks_of
from gpu_worker.layers.mixers import Run, StateBatch
from gpu_worker.layers.scan_mixer import ScanMixer
from gpu_worker.model.prepare import prepare_model
from lora_kernels import cpu
from lora_kernels.tables import GatedDelta, GatedScan

pytestmark = pytest.mark.skipif(not cpu.load(), reason="no native kernels: layers stay transformers' own")

LENGTHS = (9, 1, 30)
"""Number of prompt tokens of each sequence."""

NUM_DECODES, NUM_SLOTS = 5, 8


class Beside:
    """A layer of transformers that continues each of several texts, in the served dtype and in fp32."""

    def __init__(self, layer: nn.Module, config: Any) -> None:
        self.dtypes = [layer.get_parameter("dt_bias").dtype, torch.float32]
        self.layers = [layer, copy.deepcopy(layer).float()]
        self.errors = torch.zeros(3)  # sums of squares: our errors, theirs, and the exact values
        self.caches = [[DynamicCache(config=config) for _ in LENGTHS] for _ in self.layers]

    def compare(self, found: Tensor, theirs: Tensor, exact: Tensor) -> None:
        """Add the errors of one result."""
        assert found.shape == exact.shape
        self.errors += torch.stack([x.float().square().sum() for x in (found - exact, theirs - exact, exact)])

    def conclude(self) -> None:
        """Compare our errors with those of transformers, which rounds more often in 16 bits, and reset them."""
        ours, theirs, size = self.errors.sqrt().tolist()
        assert ours <= 1.5 * theirs + 1e-5 * size
        self.errors.zero_()

    def check(self, found: Sequence[Tensor], texts: Sequence[Tensor]) -> None:
        """Add the errors of outputs [1, n, D] for each text's next rows [1, n, D]."""
        for i, (own, rows) in enumerate(zip(found, texts, strict=True)):
            theirs, exact = (
                layer(rows.to(dtype), caches[i])
                for layer, caches, dtype in zip(self.layers, self.caches, self.dtypes, strict=True)
            )
            self.compare(own, theirs, exact)

    def check_states(self, found: GatedDelta | GatedScan, slots: Sequence[int]) -> None:
        """Add the errors of the states in the texts' slots."""
        for i, slot in enumerate(slots):
            theirs, exact = (numbers(caches[i].get_recurrent_state(0, state_idx=0)) for caches in self.caches)
            is_turned = isinstance(found, GatedScan)
            self.compare(found.states[slot].mT if is_turned else found.states[slot], theirs, exact)
            theirs, exact = (numbers(caches[i].get_conv_state(0, state_idx=0)).T for caches in self.caches)
            self.compare(found.conv_states[slot][-len(exact) :], theirs, exact)


def numbers(state: Tensor | None) -> Tensor:
    assert state is not None
    return state[0]


LAYERS = {
    "qwen3_5_text": ("model.layers.0.linear_attn", DeltaMixer),
    "mamba2": ("backbone.layers.0.mixer", ScanMixer),
    "bamba": ("model.layers.0.mamba", ScanMixer),
}
"""Model types, a layer of each, and the layer that replaces it."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", LAYERS)
def test_outputs_and_states_are_transformers(model_type: str, dtype: torch.dtype) -> None:
    (name, kind), base, device = LAYERS[model_type], tiny_model(model_type), torch.device("cpu")
    nn.Module.to(base, dtype)  # `PreTrainedModel.to` has no types
    theirs = Beside(copy.deepcopy(base.get_submodule(name)), base.config)
    model = prepare_model(base, frozenset(), None)
    mixer = getattr(model.module.get_submodule(name).forward, "__self__", None)
    assert isinstance(mixer, (DeltaMixer, ScanMixer))
    assert type(mixer) is kind
    if kind is DeltaMixer:
        assert model.plain is not None, "the whole model runs as one call"
        assert len(stacks_of(model.module)) == 1
    model.mixers.allocate(NUM_SLOTS, device)
    texts = [randn(1, num + NUM_DECODES, base.config.hidden_size, dtype=dtype, seed=num) for num in LENGTHS]
    slots, later = [5, 0, 3], [5, 6, 3]  # one sequence moves to another slot at its first decode
    with torch.inference_mode():
        ends = list(itertools.accumulate(LENGTHS))
        parts = zip(ends, LENGTHS, slots, strict=True)
        runs = [Run(end - num, end, NUM_SLOTS - 1, slot, num) for end, num, slot in parts]
        model.mixers.batch = StateBatch.of([], runs, [], device)
        now = [text[:, :num] for text, num in zip(texts, LENGTHS, strict=True)]
        theirs.check(mixer.forward(torch.cat(now, 1)).split(LENGTHS, 1), now)
        theirs.conclude()
        for step in range(NUM_DECODES):
            singles = [(i, read, write) for i, (read, write) in enumerate(zip(slots, later, strict=True))]
            model.mixers.batch = StateBatch.of(singles, [], [], device)
            now = [text[:, num + step, None] for text, num in zip(texts, LENGTHS, strict=True)]
            theirs.check(mixer.forward(torch.cat(now, 1)).split(1, 1), now)
            slots = later
        theirs.conclude()
        theirs.check_states(mixer.constants, slots)
        theirs.conclude()
