"""The test of one model type: a mixed batch of the base and two adapters against transformers and PEFT."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from oracle.peft_oracle import FAMILY_OF_TYPE, TINY_VOCAB, Lora, Oracle, ask, greedy_request, prompts, watch
from oracle.tiny_models import TINY, tiny_model
from peft.utils.transformers_weight_conversion import _MOE_TARGET_MODULE_MAPPING
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gpu_worker.engine.engine import Engine
from gpu_worker.engine.runner import StepInputs
from gpu_worker.layers.lora import SiteInfo
from gpu_worker.loading.checkpoint import one_line
from gpu_worker.model.model import BaseModel
from gpu_worker.model.prepare import prepare_model
from gpu_worker.one_by_one.account import Continues
from protocol.wire.errors import BadRequest

NUM_NEW = 8
LENGTHS = (5, 33, 20)
MAX_DIFFERENCE = 1e-4
"""Maximum difference of a logit from PEFT's, in fp32."""


NO_OUT_PROJ = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
"""Types for which PEFT refuses LoRA on out_proj: their fused training kernels read its weight without running it."""


GOES_ON_BY: dict[Continues, str] = {
    "chunks": "",
    "tokens": ", prompts by token after the first chunk",
    "nothing": ", each token after a pass over all of its text",
}
"""Notes for users on how sequences run unbatched."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The engine's results for a model type."""

    refused: str = ""  # the reason
    difference: float = 0.0  # maximum over all logits and adapters
    effect: float = 0.0  # maximum change of a prompt's logits by an adapter, minimum over both
    num_calls: int = 0  # attention calls in a forward pass, or layers that run by shortcut if there are more
    num_shortcuts: int = 0  # whole layers that run by shortcut
    notes: str = ""
    num_grouped: int = 0  # expert modules whose LoRA is rows of the pool


Adapters = Callable[[PreTrainedModel, BaseModel], dict[str, Lora]]
"""Return the adapters to compare, given the untouched model and the prepared one."""


def try_type(model_type: str, adapters: Adapters | None = None) -> Outcome:
    """Try a tiny model of a type."""
    try:
        model = tiny_model(model_type)
    except ImportError as error:
        return Outcome(refused=f"not tried: {one_line(error).partition(' but ')[0]}")
    except AttributeError as error:  # transformers' AutoModelForCausalLM makes no model from this config
        return Outcome(refused=f"not tried: {one_line(error)}")
    return conform(model, adapters)


def conform(model: PreTrainedModel, adapters: Adapters | None = None) -> Outcome:
    """Compare the engine's tokens and logits with PEFT's. Raises AssertionError where they differ.

    adapters: None for `adapters_for`.
    """
    try:
        tried = prepare_model(copy.deepcopy(model), frozenset(), None)
        sites, passes = tried.sites, tried.passes
        loras = adapters_for(model, sites) if adapters is None else adapters(model, tried)
        oracle = Oracle(model, loras, scale=0.4)
        step_tokens = 16 if passes is None or passes.continues != "nothing" else sum(LENGTHS)  # else a text must fit
        engine = oracle.engine(max_step_tokens=step_tokens, max_num_seqs=8)
    except BadRequest as refusal:
        return Outcome(refused=refusal.message.partition(" cannot be served: ")[2].removeprefix("it has "))
    logits = watch_logits(engine)
    texts = prompts(len(LENGTHS), TINY_VOCAB, LENGTHS)
    requests = [
        greedy_request(f"{name}/{i}", name, prompt, NUM_NEW) for i, prompt in enumerate(texts) for name in oracle.names
    ]
    asked = ask(engine, requests)
    assert not {output.error.message for output in asked.finish.values() if output.error is not None}
    differences, effects = [], []
    for request in requests:
        name, prompt, got = request.digest, request.prompt, asked.ids[request.rid]
        ids = np.concatenate([prompt, got])
        expected, base = (oracle.logits(who, ids)[len(prompt) - 1 : -1] for who in (name, ""))
        tokens, generated = oracle.generate(name, prompt, NUM_NEW)
        if engine.model.mixers.calls or engine.model.passes:
            expected = generated  # for some mixers, transformers computes token by token otherwise than at once
        rows = torch.stack([logits[request.rid, number] for number in range(NUM_NEW)])
        differences.append((rows - expected).abs().max().item())
        assert got == tokens, f"{request.rid}: {got} is not {tokens}, its logits {differences[-1]:.1g} off"
        if name:
            effects.append((expected - base).abs().max().item())
    return Outcome(
        difference=max(differences),
        effect=min(effects),
        num_calls=max(len(engine.model.layers), engine.model.num_shortcuts),
        num_shortcuts=engine.model.num_shortcuts,
        notes="; ".join(notes_on(oracle.untouched, engine, sites)),
        num_grouped=len(engine.model.adaptable.experts),
    )


def notes_on(model: PreTrainedModel, engine: Engine, sites: list[SiteInfo]) -> list[str]:
    """Return notes for users of the type."""
    notes = []
    if model.config.get_text_config() is not model.config:
        notes.append("text only")
    passes = engine.model.passes
    if passes is not None:
        notes.append(f"unbatched{GOES_ON_BY[passes.continues]}")
    layers = engine.model.layers
    if any(layer.call.chunk for layer in layers):
        notes.append("sequences of one attention chunk at most")
    elif 0 < engine.model.max_positions < TINY["max_position_embeddings"]:
        notes.append("sequences of one sliding window at most")
    if any(layer.owner for layer in layers):
        notes.append("layers that share keys and values keep them once")
    if len({layer.call.module for layer in layers}) < len(layers):
        notes.append("layers that run several times")
    unserved = unserved_linears(model, sites)
    if unserved:
        notes.append(f"no adapter on {', '.join(unserved)}")
    return notes


def adapters_for(model: PreTrainedModel, sites: list[SiteInfo]) -> dict[str, Lora]:
    """Return two adapters of different ranks: on some attention layers, and on every layer except the head."""
    model_type = str(FAMILY_OF_TYPE.get(model.config.model_type))
    moved = _MOE_TARGET_MODULE_MAPPING.get(model_type, {})  # last names that PEFT redirects to the fused experts
    inner = [site for site in sites if any(part.isdigit() for part in site.name.split("."))]
    inner = [site for site in inner if site.name.rpartition(".")[2] not in moved]
    if model.config.model_type in NO_OUT_PROJ:
        inner = [site for site in inner if not site.name.endswith(".out_proj")]
    attention = [site for site in inner if site.group == 0]
    options = {"fan_in_fan_out": True} if any(site.kind == "conv1d" for site in inner) else {}
    return {
        "few": Lora(3, targets_of(model, attention[::2] or inner[::2]), options),
        "all": Lora(5, targets_of(model, inner), options),
    }


def targets_of(model: PreTrainedModel, sites: list[SiteInfo]) -> tuple[str, ...]:
    """Return target_modules that match these sites and no other module: last names where they are unambiguous."""
    names = {site.name for site in sites}
    last = {name.rpartition(".")[2] for name in names}
    clear = {part for part in last if all(n in names for n, _ in model.named_modules() if n.rpartition(".")[2] == part)}
    return (*sorted(clear), *sorted(name for name in names if name.rpartition(".")[2] not in clear))


def watch_logits(engine: Engine) -> dict[tuple[str, int], Tensor]:
    """Return a dict that fills with the logits [V] of output tokens, by request id and token number."""
    seen: dict[tuple[str, int], Tensor] = {}

    def look(inputs: StepInputs, logits: Tensor) -> None:
        for row, seq in zip(logits, inputs.ready, strict=False):
            seen[seq.rid, seq.num_output] = row.clone()

    watch(engine, look)
    return seen


def unserved_linears(model: PreTrainedModel, sites: list[SiteInfo]) -> list[str]:
    """Return the last names of the text model's linear layers that no adapter can change."""
    names = {site.name for site in sites}
    layers = next(name[: match.end()] for name in sorted(names) if (match := re.match(r".*?\.(?=\d+\.)", name)))
    linears = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    missing = [name for name in linears if name.startswith(layers) and name not in names]
    return sorted({name.rpartition(".")[2] for name in missing})
