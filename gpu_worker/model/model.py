"""The base model: a Hugging Face causal LM whose attention and linear layers are ours.

What the layers are is found by watching one trial run, never by the model's name.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gpu_worker.model.attention import ATTENTION, AttentionCall, PagedLayer, StepContext, make_layers
from gpu_worker.model.checkpoint import one_line, quantisation_of, read_eos_ids, read_model
from gpu_worker.model.compiled import install_compiled
from gpu_worker.model.lora import SharedInput, SiteInfo, install_sites
from gpu_worker.model.places import Places, find_places
from gpu_worker.model.shortcuts import install_shortcuts
from gpu_worker.model.trial import Trial, run_trial
from lora_kernels import ops
from protocol.wire.errors import BadRequest

logger = logging.getLogger(__name__)

CANNOT_RUN = (
    TypeError, ValueError, LookupError, AttributeError, RuntimeError, NotImplementedError, ImportError, AssertionError
)  # fmt: skip
"""What a model raises that wants images, a mask or a cache of its own, or kernels that this machine lacks."""

LAST_DIGITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative differences that rounding and another order of sums may make of a number."""

SERVED_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(slots=True)
class BaseModel:
    """A loaded model, ready for packed steps once its caches are allocated."""

    module: PreTrainedModel
    device: torch.device
    dtype: torch.dtype
    context: StepContext
    layers: list[PagedLayer]
    sites: list[SiteInfo]
    shared: list[SharedInput]  # in the order of their sites
    places: Places
    eos_ids: frozenset[int]
    max_positions: int  # longest sequence the model can serve; 0: no limit known
    fingerprint: str
    keeps_logits: bool  # forward takes logits_to_keep
    num_shortcuts: int  # layers that run by shortcut as a whole
    check: LogitsCheck | None = None

    @property
    def config(self) -> Any:
        return self.module.config.get_text_config()

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def forward(self, input_ids: Tensor, position_ids: Tensor, logit_rows: Tensor | None) -> Tensor:
        """Return the logits [rows, V] of a packed step: input_ids, position_ids [T] int64, logit_rows [rows] int64.

        logit_rows: None for all T.
        """
        inputs = {"input_ids": input_ids[None], "position_ids": position_ids[None], "use_cache": False}
        if logit_rows is None:
            return self.module(**inputs).logits[0]
        if self.keeps_logits:
            return self.module(**inputs, logits_to_keep=logit_rows).logits[0]
        return self.module(**inputs).logits[0, logit_rows]


@dataclass(frozen=True, slots=True)
class LogitsCheck:
    """What the untouched model said to a few random prompts, each alone, to hold the finished engine against."""

    prompts: list[Tensor]  # int64 [T]
    logits: list[Tensor]  # [T, V] of each
    sensitivity: float = 0.0  # difference that the last digits of its embeddings make, see `spread_of`


def choose_device(device: str) -> torch.device:
    """Return the device for a setting of auto, cpu or cuda."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise BadRequest("device is cuda, but torch finds no CUDA device")
    return torch.device(device)


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the dtype for a setting; auto is bfloat16 where the hardware multiplies it natively, else float32."""
    if dtype != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[dtype]
    capabilities = torch.cpu.get_capabilities()
    native = device.type == "cuda" or capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if native else torch.float32


def load_model(
    folder: Path, device: torch.device, dtype: torch.dtype, impl: ops.Impl | None, *, compiled: bool = False
) -> BaseModel:
    """Load a model folder for serving. Raises BadRequest naming what cannot be served."""
    module = read_model(folder, device, dtype)
    return prepare_model(module, read_eos_ids(folder, module.config), impl, compiled=compiled)


def prepare_model(
    module: PreTrainedModel, eos_ids: frozenset[int], impl: ops.Impl | None, *, compiled: bool = False
) -> BaseModel:
    """Turn a Hugging Face causal LM into one that runs packed steps over paged caches. Changes `module`.

    compiled: let torch compile each layer as Hugging Face wrote it, instead of shortcuts.
    """
    config = module.config.get_text_config()
    _refuse_layer_types(module, config)
    fingerprint = fingerprint_of(module)
    device, dtype = module.device, module.dtype
    keeps_logits = "logits_to_keep" in inspect.signature(module.forward).parameters
    try:
        with torch.inference_mode():
            check = _ask_untouched(module, config)
            module.set_attn_implementation(ATTENTION)
            trial = run_trial(module, keeps_logits)
    except CANNOT_RUN as error:
        method, what = quantisation_of(module.config), "a forward pass that needs more than tokens"
        what = f"layers quantised with {method} that cannot run here" if method else what
        raise refusal(module, [f"{what}: {one_line(error)}"]) from error
    _refuse_calls(module, trial, config)
    context = StepContext()
    layers = make_layers(trial.attention, context, impl)
    names = {module_: name for name, module_ in module.named_modules()}
    attention_names = {names[layer.call.module] for layer in layers}
    sites, shared = install_sites(module, trial.linears, attention_names, context, impl)
    places = find_places(module, trial.per_token, sites, shared, context)
    num_short = 0 if compiled else _shorten(module, trial, layers, places, impl)
    places.watch()
    if device.type == "cpu" and not compiled:
        _compute_angles_alone(module)
    if compiled:
        num_compiled = install_compiled(module, layers, shared, context)
        logger.info("%d layers of %s are compiled", num_compiled, module.config.model_type)
    else:
        logger.info("%d of %d layers of %s run by shortcuts", num_short, len(layers), module.config.model_type)
    return BaseModel(
        module=module, device=device, dtype=dtype, context=context, layers=layers, sites=sites, shared=shared,
        places=places, eos_ids=eos_ids, max_positions=_max_positions(config, trial.attention), fingerprint=fingerprint,
        keeps_logits=keeps_logits, num_shortcuts=num_short, check=check,
    )  # fmt: skip


def _compute_angles_alone(module: PreTrainedModel) -> None:
    """Let rotary embeddings be computed by the calling thread.

    Their sines are a few microseconds, which torch shares among its threads all the same, and waits for every one of
    them: for milliseconds where another process holds its core.
    """
    for part in module.modules():
        if any(name.endswith("inv_freq") for name, _ in part.named_buffers(recurse=False)):
            part.forward = _alone(part.forward)


def _alone(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_num_threads(num_threads)

    return run


def _shorten(
    module: PreTrainedModel, trial: Trial, layers: list[PagedLayer], places: Places, impl: ops.Impl | None
) -> int:
    """Install the shortcuts, checking them on the trial's tokens in a cache of one block."""
    for layer in layers:
        layer.allocate(1, module.dtype, module.device)
    with torch.inference_mode():
        return install_shortcuts(module, trial, layers, places, impl)


def fingerprint_of(module: PreTrainedModel) -> str:
    """Return a hash of the config and of the names and shapes of all weights."""
    config = module.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation"):
        config.pop(volatile, None)
    layout = sorted((name, list(weight.shape)) for name, weight in module.state_dict().items())
    text = json.dumps([config, layout], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _ask_untouched(module: PreTrainedModel, config: Any) -> LogitsCheck:
    """Ask the model with Hugging Face's own attention; the prompts are longer than the window, if that is short."""
    window = getattr(config, "sliding_window", None) or 0
    longest = window + 8 if 16 < window <= 512 else 24
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(config.vocab_size, (num,), generator=generator) for num in (longest, longest - 7)]
    prompts = [ids.to(module.device) for ids in prompts]
    logits = _logits_of(module, prompts)
    if not quantisation_of(module.config):
        return LogitsCheck(prompts, logits)
    with last_digits_changed(module):
        return LogitsCheck(prompts, logits, spread_of(_logits_of(module, prompts), logits))


def _logits_of(module: PreTrainedModel, prompts: list[Tensor]) -> list[Tensor]:
    found = []
    for ids in prompts:
        positions = torch.arange(len(ids), device=ids.device)
        found.append(module(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0])
    return found


@contextlib.contextmanager
def last_digits_changed(module: PreTrainedModel) -> Iterator[None]:
    """Change the embeddings as little as another order of sums would.

    Layers that round what they are given, to int8 say, make more of it: a number on the edge becomes the next one.
    """
    generator = torch.Generator().manual_seed(1)

    def hook(_: nn.Module, args: Any, out: Tensor) -> Tensor:
        noise = torch.randn(out.shape, generator=generator).to(out.device)
        return (out.float() * (1 + LAST_DIGITS[out.dtype] * noise)).to(out.dtype)

    handle = module.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def spread_of(logits: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the root mean square difference of logits relative to the spread of those expected."""
    got, right = torch.cat(list(logits)).float(), torch.cat(list(expected)).float()
    return ((got - right).square().mean().sqrt() / right.std()).item()


def refusal(module: PreTrainedModel, reasons: list[str]) -> BadRequest:
    """Return the refusal of a model for what it has."""
    return BadRequest(f"model type {module.config.model_type} cannot be served: it has {'; '.join(reasons)}")


def _refuse_layer_types(module: PreTrainedModel, config: Any) -> None:
    reasons = []
    if not module._supports_attention_backend:
        reasons.append("attention that cannot be replaced (no AttentionInterface)")
    unknown = set(getattr(config, "layer_types", None) or ()) - SERVED_LAYER_TYPES
    if unknown:
        reasons.append(f"layers of type {', '.join(sorted(unknown))}")
    if getattr(config, "is_encoder_decoder", False):
        reasons.append("an encoder")
    if "position_ids" not in inspect.signature(module.forward).parameters:
        reasons.append("no way to be told the tokens' positions")
    if reasons:
        raise refusal(module, reasons)


def _refuse_calls(module: PreTrainedModel, trial: Trial, config: Any) -> None:
    reasons = []
    calls = trial.attention
    if len(calls) < config.num_hidden_layers:
        reasons.append(f"{len(calls)} attention calls for {config.num_hidden_layers} layers")
    if any(not call.is_causal for call in calls):
        reasons.append("attention in both directions")
    if any(call.has_own_mask for call in calls):
        reasons.append("attention with a mask of its own making")
    if reasons:
        raise refusal(module, reasons)


def _max_positions(config: Any, calls: list[AttentionCall]) -> int:
    """Return the longest sequence that is computed exactly whatever else is in its step; 0 if there is no limit."""
    limits = [getattr(config, "max_position_embeddings", None), getattr(config, "n_positions", None)]
    limits += _rope_limits(config)
    limits += [call.chunk for call in calls]  # exact as long as all fits one chunk
    if not getattr(config, "layer_types", None) and not any(call.window for call in calls):
        limits.append(getattr(config, "sliding_window", None))  # which only Hugging Face's own cache keeps then
    return min((limit for limit in limits if limit), default=0)


def _rope_limits(config: Any) -> list[int]:
    """Return the lengths beyond which rotary frequencies depend on the longest sequence of the step."""
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # by layer type in some models
    return [
        part.get("original_max_position_embeddings") or config.max_position_embeddings
        for part in parts
        if part.get("rope_type") in ("dynamic", "longrope")
    ]
