"""Turns a Hugging Face causal LM into a `BaseModel`: its attention and linear layers become ours.

What the layers are is found by watching one trial run, never by the model's name.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from gpu_worker.model.adaptable_modules import find_adaptable_modules
from gpu_worker.model.attention import ATTENTION, AttentionCall, StepContext, make_layers
from gpu_worker.model.checkpoint import read_eos_ids, read_model, refusal, refuse_what_cannot_run, takes_positions
from gpu_worker.model.compiled import install_compiled
from gpu_worker.model.logits_check import ask_untouched
from gpu_worker.model.lora import install_sites
from gpu_worker.model.mixers import MixerStates
from gpu_worker.model.model import BaseModel, fingerprint_of
from gpu_worker.model.shortcuts import install_shortcuts
from gpu_worker.model.trial import Trial, run_trial
from lora_kernels import ops
from protocol.wire.errors import BadRequest

logger = logging.getLogger(__name__)

SERVED_LAYER_TYPES = {
    "full_attention", "sliding_attention", "chunked_attention", "linear_attention", "conv", "mlp", "moe", "hybrid",
    "hybrid_sliding",
}  # fmt: skip


def load_model(
    folder: Path, device: torch.device, dtype: torch.dtype, impl: ops.Impl | None, *, compiled: bool = False
) -> BaseModel:
    """Load a model folder and prepare it, see `prepare_model`. Raises BadRequest naming what cannot be served."""
    module = read_model(folder, device, dtype)
    return prepare_model(module, read_eos_ids(folder, module.config), impl, compiled=compiled)


def prepare_model(
    module: PreTrainedModel, eos_ids: frozenset[int], impl: ops.Impl | None, *, compiled: bool = False
) -> BaseModel:
    """Turn a Hugging Face causal LM into one that runs packed steps over paged caches. Changes `module`.

    eos_ids: token ids that end a text. impl: the kernels' implementation, None for the device's own. compiled: torch
    compiles each layer as Hugging Face wrote it, instead of shortcuts. Raises BadRequest naming what cannot be served.
    """
    config = module.config.get_text_config()
    _refuse_module(module, config)
    fingerprint = fingerprint_of(module)
    device, dtype = module.device, module.dtype
    keeps_logits = "logits_to_keep" in inspect.signature(module.forward).parameters
    with refuse_what_cannot_run(module), torch.inference_mode():
        check = ask_untouched(module, config)
        module.set_attn_implementation(ATTENTION)
        trial = run_trial(module, keeps_logits)
    _refuse_calls(module, trial)
    if compiled and trial.mixers:
        raise BadRequest("compile is on, but this model's layers keep states, and cannot be compiled")
    context = StepContext()
    layers = make_layers(trial.attention, context, impl)
    names = {module_: name for name, module_ in module.named_modules()}
    attention_names = {names[layer.call.module] for layer in layers} | trial.mixer_modules
    sites, shared = install_sites(module, trial.linears, attention_names, context, impl)
    adaptable = find_adaptable_modules(module, trial.per_token, sites, shared, context)
    num_shortcuts = 0
    if not compiled:
        for layer in layers:  # of one block: the trial's tokens, on which shortcuts are checked
            layer.allocate(1, dtype, device)
        with torch.inference_mode():
            num_shortcuts = install_shortcuts(module, trial, layers, adaptable, impl)
    adaptable.watch()
    if device.type == "cpu" and not compiled:
        _compute_angles_on_one_thread(module)
    if compiled:
        num_compiled = install_compiled(module, layers, shared, context)
        logger.info("%d layers of %s are compiled", num_compiled, module.config.model_type)
    else:
        logger.info("%d of %d layers of %s run by shortcuts", num_shortcuts, len(layers), module.config.model_type)
    return BaseModel(
        module=module, device=device, dtype=dtype, context=context, layers=layers, sites=sites, shared=shared,
        adaptable=adaptable, eos_ids=eos_ids, max_positions=_max_positions(config, trial.attention),
        fingerprint=fingerprint, keeps_logits=keeps_logits, num_shortcuts=num_shortcuts,
        mixers=MixerStates(trial.mixers), takes_positions=takes_positions(module), check=check,
    )  # fmt: skip


def _compute_angles_on_one_thread(module: nn.Module) -> None:
    """Make the calling thread alone compute rotary embeddings.

    Their sines take a few microseconds. Torch shares even those among its threads and waits for every one of them: for
    milliseconds, where another process holds a thread's core.
    """
    for part in module.modules():
        if any(name.endswith("inv_freq") for name, _ in part.named_buffers(recurse=False)):
            part.forward = _on_one_thread(part.forward)


def _on_one_thread(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_num_threads(num_threads)

    return run


# ---------------------------------------------------------------- what cannot be served


def _refuse_module(module: PreTrainedModel, config: Any) -> None:
    """Raise BadRequest for what a model's class or config shows that cannot be served."""
    reasons = []
    unknown = set(getattr(config, "layer_types", None) or ()) - SERVED_LAYER_TYPES
    if unknown:
        reasons.append(f"layers of type {', '.join(sorted(unknown))}")
    if getattr(config, "is_encoder_decoder", False):
        reasons.append("an encoder")
    if reasons:
        raise refusal(module, reasons)


def _refuse_calls(module: PreTrainedModel, trial: Trial) -> None:
    """Raise BadRequest for attention calls in a trial run that paged attention does not compute."""
    reasons = []
    calls = trial.attention
    if not calls and not trial.mixers:
        reasons.append("attention that cannot be replaced (no AttentionInterface)")
    if calls and not takes_positions(module):
        reasons.append("no way to be told the tokens' positions")
    if any(not call.is_causal for call in calls):
        reasons.append("attention in both directions")
    if any(call.has_own_mask for call in calls):
        reasons.append("attention with a mask of its own making")
    if reasons:
        raise refusal(module, reasons)


# ---------------------------------------------------------------- the longest sequence


def _max_positions(config: Any, calls: list[AttentionCall]) -> int:
    """Return the longest sequence that is computed exactly whatever else is in its step; 0 if there is no limit."""
    limits = [getattr(config, "max_position_embeddings", None), getattr(config, "n_positions", None)]
    limits += _rope_limits(config)
    limits += [call.chunk for call in calls]  # a sequence that fits one chunk sees all of itself
    if not getattr(config, "layer_types", None) and not any(call.window for call in calls):
        limits.append(getattr(config, "sliding_window", None))  # a window that only Hugging Face's cache would keep
    return min((limit for limit in limits if limit), default=0)


def _rope_limits(config: Any) -> list[int]:
    """Return the lengths beyond which rotary frequencies depend on the longest sequence of the step."""
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # some models have one per layer type
    return [
        part.get("original_max_position_embeddings") or config.max_position_embeddings
        for part in parts
        if part.get("rope_type") in ("dynamic", "longrope")
    ]
