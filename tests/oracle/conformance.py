"""One model type's test: a mixed batch of the base and two adapters against transformers and PEFT."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from oracle.peft_oracle import TINY_VOCAB, Lora, Oracle, ask, greedy_request, prompts
from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gpu_worker.engine import Engine
from gpu_worker.lora import SiteInfo
from gpu_worker.model import prepare_model
from gpu_worker.runner import StepInputs
from protocol.errors import BadRequest

NUM_NEW = 8
LENGTHS = (5, 33, 20)
MAX_DIFFERENCE = 1e-4
"""Largest difference of a logit from what PEFT computes, in fp32."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the engine made of a model type."""

    refused: str = ""  # why
    difference: float = 0.0  # largest of any logit, all adapters
    effect: float = 0.0  # smallest change that an adapter makes to the largest logit
    num_layers: int = 0  # attention calls of a forward pass
    num_shortcuts: int = 0
    longest: int = 0
    unserved: tuple[str, ...] = ()  # linear layers that no adapter can change, by their last name


def conform(model: PreTrainedModel) -> Outcome:
    """Compare tokens and logits. Raises AssertionError where they differ."""
    try:
        sites = prepare_model(copy.deepcopy(model), frozenset(), None).sites
    except BadRequest as refusal:
        return Outcome(refused=refusal.message)
    oracle = Oracle(model, adapters_for(model, sites), scale=0.4)
    try:
        engine = oracle.engine(max_step_tokens=16, max_num_seqs=8)
    except BadRequest as refusal:
        return Outcome(refused=refusal.message)
    logits = watch_logits(engine)
    asked_prompts = prompts(len(LENGTHS), TINY_VOCAB, LENGTHS)
    asked = ask(
        engine,
        [
            greedy_request(f"{name}/{i}", name, prompt, NUM_NEW)
            for i, prompt in enumerate(asked_prompts)
            for name in oracle.names
        ],
    )
    errors = {output.error.message for output in asked.finish.values() if output.error is not None}
    assert not errors
    differences, effects = [], []
    for name in oracle.names:
        for i, prompt in enumerate(asked_prompts):
            got = asked.ids[f"{name}/{i}"]
            ids = np.concatenate([prompt, got])
            expected, base = (oracle.logits(who, ids)[len(prompt) - 1 : -1] for who in (name, ""))
            rows = torch.stack([logits[f"{name}/{i}", n] for n in range(NUM_NEW)])
            differences.append((rows - expected).abs().max().item())
            tokens = oracle.greedy(name, prompt, NUM_NEW)
            assert got == tokens, (
                f"adapter {name!r}, prompt {i}: {got} is not {tokens}; logits {differences[-1]:.1g} off"
            )
            if name:
                effects.append((expected - base).abs().max().item())
    return Outcome(
        difference=max(differences),
        effect=min(effects),
        num_layers=len(engine.model.layers),
        num_shortcuts=engine.model.num_shortcuts,
        longest=engine.model.max_positions,
        unserved=unserved_linears(oracle.untouched, sites),
    )


def adapters_for(model: PreTrainedModel, sites: list[SiteInfo]) -> dict[str, Lora]:
    """Return two adapters of different ranks: on some attention layers, and on every layer but the head."""
    model_type = str(_MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type))
    moved = _MOE_TARGET_MODULE_MAPPING.get(model_type, {})  # last names that PEFT takes for the fused experts
    inner = [site for site in sites if any(part.isdigit() for part in site.name.split("."))]
    inner = [site for site in inner if site.name.rpartition(".")[2] not in moved]
    attention = [site for site in inner if site.group == 0]
    options = {"fan_in_fan_out": True} if any(site.kind == "conv1d" for site in inner) else {}
    return {
        "few": Lora(3, targets_of(model, attention[::2] or inner[::2]), options),
        "all": Lora(5, targets_of(model, inner), options),
    }


def targets_of(model: PreTrainedModel, sites: list[SiteInfo]) -> tuple[str, ...]:
    """Return target_modules that mean these sites and no other module: last names where they are clear."""
    names = {site.name for site in sites}
    last = {name.rpartition(".")[2] for name in names}
    clear = {part for part in last if all(n in names for n, _ in model.named_modules() if n.rpartition(".")[2] == part)}
    return (*sorted(clear), *sorted(name for name in names if name.rpartition(".")[2] not in clear))


def watch_logits(engine: Engine) -> dict[tuple[str, int], Tensor]:
    """Return a map that fills with the logits [V] of each request's output tokens, by number."""
    seen: dict[tuple[str, int], Tensor] = {}
    run = engine.runner.run

    def watched(inputs: StepInputs) -> Tensor:
        logits = run(inputs)
        for row, seq in zip(logits, inputs.ready, strict=False):
            seen[seq.rid, seq.num_output] = row.clone()
        return logits

    engine.runner.run = watched  # pyright: ignore[reportAttributeAccessIssue] - a spy
    return seen


def unserved_linears(model: PreTrainedModel, sites: list[SiteInfo]) -> tuple[str, ...]:
    """Return the last names of the linear layers that no adapter can change."""
    names = {site.name for site in sites}
    linears = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    return tuple(sorted({name.rpartition(".")[2] for name in linears if name not in names}))
