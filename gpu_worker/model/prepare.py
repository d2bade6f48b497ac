"""Turns a Hugging Face causal LM into a `BaseModel`, with our attention and linear layers.

The layers are found by watching a trial run, never by the model's name.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gpu_worker.layers.adaptable_modules import AdaptableModules, find_adaptable_modules
from gpu_worker.layers.attention import ATTENTION, AttentionCall, StepContext, make_layers, unbind
from gpu_worker.layers.expert_modules import compute_with_blocks
from gpu_worker.layers.lightning import install_lightning
from gpu_worker.layers.lora import install_sites, linear_shape
from gpu_worker.layers.mixers import MixerStates
from gpu_worker.layers.tied import install_tied
from gpu_worker.loading.checkpoint import read_eos_ids, refusal, refuse_what_cannot_run, takes_positions
from gpu_worker.model.compiled import install_compiled
from gpu_worker.model.kept_answers import KeptAnswers, answers_of
from gpu_worker.model.logits_check import LogitsCheck, ask_untouched
from gpu_worker.model.model import BaseModel, fingerprint_of
from gpu_worker.model.one_by_one_trial import find_passes, watch
from gpu_worker.model.shortcuts import install_shortcuts
from gpu_worker.model.trial import Trial, run_trial
from gpu_worker.quantised.modules import has_rounded_inputs, round_inputs_of
from gpu_worker.tasks.headless import read_decoder
from gpu_worker.tasks.model_tasks import ModelTasks, decoder_of, head_name_of, hidden_states
from lora_kernels import ops
from protocol.wire.errors import BadRequest
from protocol.wire.messages import SiteShape

logger = logging.getLogger(__name__)

MAX_IDLE = 4_096
"""Maximum number of layers that no pass runs, reported to the fleet: every heartbeat of a worker has their names."""

SERVED_LAYER_TYPES = {
    "full_attention", "sliding_attention", "chunked_attention", "linear_attention", "conv", "mlp", "moe", "hybrid",
    "hybrid_sliding",
}  # fmt: skip


def load_model(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    impl: ops.Impl | None,
    *,
    score_tokens: str = "",
    compiled: bool = False,
    keeps_answers: bool = False,
    rounds_inputs: bool | None = False,
) -> BaseModel:
    """Load a model folder and prepare it, see `prepare_model`. Raises BadRequest naming what is not supported.

    score_tokens: see `read_score_tokens`. keeps_answers: use cached answers of an earlier start on a CPU, see
    `kept_answers`. rounds_inputs: see `round_inputs_of`; None: of the quantized layers, if there are any.
    """
    module, tasks = read_decoder(folder, device, dtype, score_tokens)
    if rounds_inputs is not False:
        round_inputs_of(module, is_required=rounds_inputs is True)
    is_rounding = has_rounded_inputs(module)
    answers = answers_of(module, folder, impl) if keeps_answers and device.type == "cpu" else None
    eos_ids = read_eos_ids(folder, module.config)
    model = prepare_model(module, eos_ids, impl, tasks, compiled=compiled, answers=answers)
    model.rounds_inputs = is_rounding
    return model


def prepare_model(
    module: PreTrainedModel,
    eos_ids: frozenset[int],
    impl: ops.Impl | None,
    tasks: ModelTasks | None = None,
    *,
    compiled: bool = False,
    answers: KeptAnswers | None = None,
) -> BaseModel:
    """Turn a Hugging Face causal LM into one that runs packed steps over paged caches. Changes `module`.

    If its layers cannot be packed, its sequences run unbatched (`passes`). eos_ids: token ids that end a text. impl:
    the kernels' implementation, None for the device's default. tasks: the model's tasks, None for those of any causal
    LM. compiled: torch compiles each layer in Hugging Face's version, instead of shortcuts. answers: cache of an
    earlier start, for which packing succeeded. Raises BadRequest naming what is not supported.
    """
    config = module.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        raise refusal(module, ["an encoder"])
    compute_with_blocks(module)
    tasks = ModelTasks(head_name=head_name_of(module.config)) if tasks is None else tasks
    fingerprint = fingerprint_of(module) + tasks.fingerprint
    check, width = (answers and answers.read()) or _ask(module)
    context = StepContext()
    model = BaseModel(
        module=module, device=module.device, dtype=module.dtype, context=context, layers=[], sites=[], shared=[],
        adaptable=AdaptableModules(context), eos_ids=eos_ids, max_positions=_max_positions(config),
        fingerprint=fingerprint, keeps_logits="logits_to_keep" in inspect.signature(module.forward).parameters,
        num_shortcuts=0, mixers=MixerStates(), takes_positions=takes_positions(module), check=check, tasks=tasks,
        width=width, answers=answers,
    )  # fmt: skip
    trial, reasons = _pack(model, impl)
    if compiled and (trial.mixers or reasons):
        what = "sequences run unbatched" if reasons else "layers keep states"
        raise BadRequest(f"compile is on, but this model's {what}, and cannot be compiled")
    if reasons:
        trial = _run_one_by_one(model, reasons)
    passes = model.passes
    if not model.width or (passes is not None and passes.continues == "nothing"):
        if not tasks.generates:
            raise refusal(module, ["no language model's head, and hidden states that cannot be had chunk by chunk"])
        model.tasks = replace(tasks, pooling=None)
    _install(model, trial, impl, compiled=compiled)
    return model


def _ask(module: PreTrainedModel) -> tuple[LogitsCheck, int]:
    """Run the unmodified model. Returns its outputs, and the width of its hidden states (0: not available)."""
    decoder = decoder_of(module)
    watched = nullcontext([]) if decoder is None else hidden_states(decoder)
    with refuse_what_cannot_run(module), torch.inference_mode(), watched as hidden:
        check = ask_untouched(module, module.config.get_text_config())
    per_token = bool(hidden) and hidden[0].shape[:2] == (1, len(check.prompts[0]))
    return check, hidden[0].shape[-1] if per_token else 0


def _pack(model: BaseModel, impl: ops.Impl | None) -> tuple[Trial, list[str]]:
    """Give a model's attention paged caches, and its mixers states. Return its trial run, and why it cannot be packed.

    The caches are large enough for the trial's tokens.
    """
    module, config = model.module, model.config
    unknown = set(getattr(config, "layer_types", None) or ()) - SERVED_LAYER_TYPES
    if unknown:
        return Trial(), [f"layers of type {', '.join(sorted(unknown))}"]
    with refuse_what_cannot_run(module), torch.inference_mode():
        install_lightning(module)
        module.set_attn_implementation(ATTENTION)
        trial = run_trial(module, model.keeps_logits)
    reasons = _unpackable(module, trial)
    if reasons:
        return trial, reasons
    model.max_positions = _max_positions(config, trial.attention)
    model.layers, model.mixers = make_layers(trial.attention, model.context, impl), MixerStates(trial.mixers)
    check = model.check
    assert check is not None
    num = len(check.prompts)
    num_blocks = num * -(-max(len(ids) for ids in check.prompts) // ops.BLOCK_TOKENS)
    for layer in model.layers:
        layer.allocate(num_blocks, model.dtype, model.device)
    model.mixers.allocate(num + 1, model.device)
    if check.origin:  # packing succeeded before, and the finished engine is checked anyway
        return trial, []
    error, limit = model.packed_difference(num_blocks, num if model.mixers.calls else 0), check.limit(model.dtype)
    if error < limit:
        return trial, []
    for layer in model.layers:
        unbind(layer.call.module)
    model.layers, model.mixers = [], MixerStates()
    model.max_positions = _max_positions(config)
    return trial, [f"packed logits that are off by {error:.2g} of their spread (limit {limit:.2g})"]


def _run_one_by_one(model: BaseModel, reasons: list[str]) -> Trial:
    """Prepare a model to run its sequences unbatched, and return the trial of that.

    reasons: why they cannot be packed. Raises BadRequest if they cannot run unbatched either.
    """
    module, check = model.module, model.check
    assert check is not None
    module.set_attn_implementation("eager")
    with torch.inference_mode():
        passes = find_passes(module, check, keeps_logits=model.keeps_logits, max_positions=model.max_positions)
        if passes is None:
            raise refusal(module, [*reasons, "no cache of its own to continue from"])
        trial = watch(passes)
    if not any(part.isdigit() for call in trial.linears for part in call.name.split(".")):
        raise refusal(module, [*reasons, "no linear layer that sees every token"])
    model.passes = passes
    account, name = passes.account, module.config.model_type
    logger.warning(
        "%s cannot be packed (%s): its sequences run unbatched, continued by %s; %d bytes each and %d a token",
        name,
        "; ".join(reasons),
        passes.continues,
        account.sequence_bytes,
        account.token_bytes,
    )
    return trial


def _idle_linears(module: PreTrainedModel, trial: Trial) -> list[SiteShape]:
    """Return up to MAX_IDLE linear layers that PEFT adapts but that passes do not run on every token.

    Those in mixers, which read some layers' weights directly, come first. trial: a trial of the model as it runs.
    """
    sites = {call.name for call in trial.linears}
    found: list[SiteShape] = []
    for name, child in module.named_modules():
        shape = linear_shape(child)
        if shape is not None and name not in sites and isinstance(child, (nn.Linear, Conv1D)):
            rows, width = shape
            has_bias = getattr(child, "bias", None) is not None
            kind = "conv1d" if isinstance(child, Conv1D) else "linear"
            found.append(SiteShape(name, width, rows, kind, has_bias))
    found.sort(key=lambda site: site.name.rpartition(".")[0] not in trial.mixer_modules)
    return found[:MAX_IDLE]


def _install(model: BaseModel, trial: Trial, impl: ops.Impl | None, *, compiled: bool) -> None:
    """Install our linear layers and shortcuts in a model. trial: a trial of the model as it runs."""
    module, context, layers = model.module, model.context, model.layers
    names = {module_: name for name, module_ in module.named_modules()}
    attention_names = {names[layer.call.module] for layer in layers} | trial.mixer_modules.keys()
    model.idle = _idle_linears(module, trial)
    model.sites, model.shared = install_sites(module, trial.linears, attention_names, context, impl)
    model.adaptable = find_adaptable_modules(
        module, trial.per_token, model.sites, model.shared, context, impl, packs_experts=not compiled
    )
    install_tied(module, trial.linears, model.adaptable)
    if not compiled and model.passes is None:
        check = model.check
        assert check is not None
        with torch.inference_mode():
            model.num_shortcuts, model.plain, agreed = install_shortcuts(
                module, trial, layers, model.mixers, model.adaptable, impl, check.agreed, model.max_positions
            )
        model.check = replace(check, agreed=agreed)
    model.adaptable.watch()
    if model.device.type == "cpu" and not compiled:
        _compute_angles_on_one_thread(module)
    if compiled:
        num_compiled = install_compiled(module, layers, model.shared, context)
        logger.info("%d layers of %s are compiled", num_compiled, module.config.model_type)
    elif model.passes is None:
        num, model_type = model.num_shortcuts, module.config.model_type
        logger.info("%d of %d layers of %s run in native code", num, len(attention_names), model_type)


def _compute_angles_on_one_thread(module: nn.Module) -> None:
    """Compute rotary embeddings on the calling thread only.

    Their sines take a few microseconds, but torch shares even those among its threads and waits for all of them: for
    milliseconds if another process occupies a thread's core.
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


# ---------------------------------------------------------------- what cannot be packed


def _unpackable(module: PreTrainedModel, trial: Trial) -> list[str]:
    """Return what paged attention does not support in a trial run, as noun phrases."""
    reasons = []
    calls = trial.attention
    if not calls and not trial.mixers:
        reasons.append("attention that cannot be replaced (no AttentionInterface)")
    if calls and not takes_positions(module):
        reasons.append("no argument for the tokens' positions")
    if any(not call.is_causal for call in calls):
        reasons.append("attention in both directions")
    if any(call.has_own_mask for call in calls):
        reasons.append("attention with a mask of its own making")
    return reasons


# ---------------------------------------------------------------- the maximum length


def _max_positions(config: Any, calls: list[AttentionCall] | None = None) -> int:
    """Return the maximum length at which a sequence's results do not depend on others in its step; 0: unlimited.

    calls: packed attention calls; None for sequences that run unbatched.
    """
    limits = [getattr(config, "max_position_embeddings", None), getattr(config, "n_positions", None)]
    limits += _rope_limits(config)
    limits += [call.chunk for call in calls or ()]  # a sequence within one chunk sees all its tokens
    if calls is not None and not getattr(config, "layer_types", None) and not any(call.window for call in calls):
        limits.append(getattr(config, "sliding_window", None))  # a window that only Hugging Face's cache would apply
    return min((limit for limit in limits if limit and limit > 0), default=0)


def _rope_limits(config: Any) -> list[int]:
    """Return the lengths beyond which rotary frequencies depend on the longest sequence of a step."""
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # some models have one per layer type
    return [
        part.get("original_max_position_embeddings") or config.max_position_embeddings
        for part in parts
        if part.get("rope_type") in ("dynamic", "longrope")
    ]
