"""Trial runs of a model: hooks record which modules call attention and linear layers, and the arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gpu_worker.layers.apply_extras import TokenLayout
from gpu_worker.layers.attention import AttentionCall, AttentionRecorder, bind, unbind
from gpu_worker.layers.lora import LinearCall, linear_shape
from gpu_worker.layers.masks import record_masks
from gpu_worker.layers.mixers import MixerCall, MixerRecorder, install_functions, running
from gpu_worker.loading.checkpoint import takes_positions

NUM_TOKENS = 5
NUM_HEAD_ROWS = 2  # distinguishes the head's rows from all tokens


@dataclass(slots=True)
class ModuleCall:
    """The arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(slots=True)
class Trial:
    """The calls of a trial run, in order."""

    attention: list[AttentionCall] = field(default_factory=list)
    linears: list[LinearCall] = field(default_factory=list)
    modules: dict[str, ModuleCall] = field(default_factory=dict)  # the first call of every module with children
    per_token: dict[str, TokenLayout] = field(default_factory=dict)  # modules with their own parameters, called once
    mixers: list[MixerCall] = field(default_factory=list)
    mixer_modules: dict[str, list[int]] = field(default_factory=dict)  # mixer-calling modules -> indexes of their calls


def run_trial(module: PreTrainedModel, keeps_logits: bool) -> Trial:
    """Run a few tokens through a causal LM with our attention, and record the calls.

    keeps_logits: whether its forward takes logits_to_keep.
    """
    trial = _watch(module, NUM_TOKENS, NUM_HEAD_ROWS, keeps_logits=keeps_logits)
    with record_masks() as masks:
        other = _watch_again(module, trial, keeps_logits)
    for call, masked in zip(trial.attention, other.attention, strict=True):
        shape = masks.shape_of(masked)
        call.has_own_mask = call.mask is not None or shape is None
        if shape is not None:
            call.window, call.chunk = shape.window, shape.chunk
        call.mask = None
    return trial


def run_encoder_trial(module: PreTrainedModel) -> Trial:
    """Run a few tokens through an encoder with our attention, and record the calls, including masks."""
    trial = _watch(module, NUM_TOKENS, NUM_HEAD_ROWS, keeps_logits=False)
    _watch_again(module, trial, keeps_logits=False)
    return trial


@dataclass(frozen=True, slots=True)
class WatchedPass:
    """A forward pass to watch, and its numbers of tokens and of rows of logits."""

    num_tokens: int
    num_head_rows: int
    run: Callable[[], object]
    num_text: int = 0  # tokens of the text so far, which some linear layers see again in every pass; 0: none do


def watch_passes(module: PreTrainedModel, passes: Sequence[WatchedPass], *, any_rows: bool = False) -> Trial:
    """Run forward passes, and return the calls of the first, limited to modules that see all tokens in every pass.

    In a pass of one token, seeing one token and seeing all tokens look the same; the other passes tell them apart.
    any_rows: also include linear layers whose rows are not the tokens.
    """
    trial, *others = [
        _Watch(module, one.num_tokens, one.num_head_rows, num_text=one.num_text, any_rows=any_rows).run(one.run)
        for one in passes
    ]
    for one, other in zip(passes[1:], others, strict=True):
        _keep_common(trial, other, linears_only=one.num_tokens == 1)
    return trial


def _watch(module: PreTrainedModel, num_tokens: int, num_head_rows: int, *, keeps_logits: bool) -> Trial:
    """Watch a forward pass of the model's first `num_tokens` ids."""
    ids = torch.arange(num_tokens, device=module.device)[None]
    keep = {"logits_to_keep": torch.arange(num_head_rows, device=ids.device)} if keeps_logits else {}
    positions = {"position_ids": ids} if takes_positions(module) else {}
    watch = _Watch(module, num_tokens, num_head_rows)
    return watch.run(lambda: module(input_ids=ids, use_cache=False, **positions, **keep))


def _watch_again(module: PreTrainedModel, trial: Trial, keeps_logits: bool) -> Trial:
    """Run other tokens through the model, and drop from `trial` the modules that do not see all tokens both times."""
    # An expert's layers see the tokens routed to it: by chance all of them once, but not twice.
    other = _watch(module, 2 * NUM_TOKENS + 1, NUM_HEAD_ROWS + 1, keeps_logits=keeps_logits)
    _keep_common(trial, other)
    return other


def _keep_common(trial: Trial, other: Trial, *, linears_only: bool = False) -> None:
    """Drop from `trial` the modules that do not see all tokens in `other` too."""
    always = {call.name for call in other.linears}
    trial.linears = [call for call in trial.linears if call.name in always]
    if not linears_only:
        trial.per_token = {n: layout for n, layout in trial.per_token.items() if other.per_token.get(n) == layout}


class _Watch:
    """One run of a model with hooks on its modules."""

    def __init__(
        self, module: PreTrainedModel, num_tokens: int, num_head_rows: int, *, num_text: int = 0, any_rows: bool = False
    ) -> None:
        self.module = module
        self.any_rows = any_rows
        self.num_text = num_text
        self.num_tokens = num_tokens
        self.num_head_rows = num_head_rows
        self.trial = Trial()
        self._recorder = AttentionRecorder()
        self._linears: dict[str, LinearCall | None] = {}  # None: called in a way that no site supports
        self._called: set[str] = set()
        self._inside: list[str] = []  # running modules, innermost last
        self._mixing: set[str] = set()  # modules in which a mixer's function was called
        self._mixers = MixerRecorder(self._note_mixer)

    def run(self, call: Callable[[], object]) -> Trial:
        """Run the model once, by `call`, and remove the hooks. May be called once."""
        handles = []
        install_functions(self.module)
        for name, child in self.module.named_modules():
            bind(child, self._recorder)
            if next(child.children(), None) is not None:
                handles.append(child.register_forward_pre_hook(self._enter_hook(name)))
                handles.append(child.register_forward_hook(self._leave_hook, always_call=True))
            if type(child) not in (nn.Linear, Conv1D) and next(child.parameters(recurse=False), None) is not None:
                handles.append(child.register_forward_hook(self._parameters_hook(name), with_kwargs=True))
            if linear_shape(child) is not None:
                handles.append(child.register_forward_hook(self._linear_hook(name)))
            elif name and next(child.children(), None) is not None:
                handles.append(child.register_forward_pre_hook(self._module_hook(name), with_kwargs=True))
        try:
            with running(self._mixers):
                call()
        finally:
            for handle in handles:
                handle.remove()
            for child in self.module.modules():
                unbind(child)
        self.trial.attention, self.trial.mixers = self._recorder.calls, self._mixers.calls
        self.trial.linears = [call for call in self._linears.values() if call is not None]
        for name in self._mixing:  # an adapter's rows on their own would have other states
            self.trial.per_token.pop(name, None)
        return self.trial

    def _enter_hook(self, name: str) -> Any:
        def hook(_: nn.Module, _args: tuple[Any, ...]) -> None:
            self._inside.append(name)

        return hook

    def _leave_hook(self, _: nn.Module, _args: tuple[Any, ...], _out: Any) -> None:
        self._inside.pop()

    def _note_mixer(self) -> None:
        self.trial.mixer_modules.setdefault(self._inside[-1], []).append(len(self._mixers.calls))
        self._mixing.update(self._inside)

    def _linear_hook(self, name: str) -> Any:
        def hook(linear: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            x = args[0] if args and isinstance(args[0], Tensor) else None
            shape = linear_shape(linear)
            num_rows = -1 if x is None else x.numel() // x.shape[-1]
            regular = isinstance(out, Tensor)
            regular &= self.any_rows or num_rows in (self.num_tokens, self.num_head_rows, self.num_text)
            if x is None or shape is None or not regular or out.shape != (*x.shape[:-1], shape[0]):
                self._linears[name] = None
                return
            if out.dtype != x.dtype:  # LoRA cannot be added to codes or to another precision
                self._linears[name] = None
                return
            known = self._linears.setdefault(name, LinearCall(name, linear, [], num_rows == self.num_head_rows))
            if known is not None:
                known.xs.append(x)

        return hook

    def _module_hook(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.trial.modules.setdefault(name, ModuleCall(args, kwargs))

        return hook

    def _parameters_hook(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            layout = TokenLayout.of([*args, *kwargs.values()], out, self.num_tokens)
            self.trial.per_token.pop(name, None)
            if name not in self._called and layout is not None:
                self.trial.per_token[name] = layout
            self._called.add(name)

        return hook
