"""One trial run of a model, watched: which modules call attention and linear layers, and with what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gpu_worker.attention import AttentionCall, Recorder, bind, unbind
from gpu_worker.extras import TokenLayout
from gpu_worker.lora import LinearCall

NUM_TOKENS = 5
NUM_HEAD_ROWS = 2  # another number, to tell the head's rows from all tokens


@dataclass(slots=True)
class ModuleCall:
    """The arguments a module was called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(slots=True)
class Trial:
    """What a trial run called, in order."""

    attention: list[AttentionCall] = field(default_factory=list)
    linears: list[LinearCall] = field(default_factory=list)
    modules: dict[str, ModuleCall] = field(default_factory=dict)  # first call of every module that has children
    per_token: dict[str, TokenLayout] = field(default_factory=dict)  # modules with own parameters, called once


def run_trial(module: PreTrainedModel, keeps_logits: bool) -> Trial:
    """Run a few tokens through a model whose attention is ours, and note what is called."""
    trial, recorder = Trial(), Recorder()
    handles = []
    called: set[str] = set()

    def watch_linear(name: str, linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        num_rows = args[0].numel() // args[0].shape[-1]
        if num_rows in (NUM_TOKENS, NUM_HEAD_ROWS):
            trial.linears.append(LinearCall(name, linear, args[0], is_head=num_rows == NUM_HEAD_ROWS))

    def watch_module(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trial.modules.setdefault(name, ModuleCall(args, kwargs))

    def watch_parameters(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        layout = TokenLayout.of([*args, *kwargs.values()], out, NUM_TOKENS)
        trial.per_token.pop(name, None)
        if name not in called and layout is not None:
            trial.per_token[name] = layout
        called.add(name)

    for name, child in module.named_modules():
        bind(child, recorder)
        if next(child.parameters(recurse=False), None) is not None and type(child) not in (nn.Linear, Conv1D):
            handles.append(
                child.register_forward_hook(
                    lambda _, args, kwargs, out, name=name: watch_parameters(name, args, kwargs, out), with_kwargs=True
                )
            )
        if type(child) in (nn.Linear, Conv1D):
            handles.append(
                child.register_forward_pre_hook(lambda linear, args, name=name: watch_linear(name, linear, args))
            )
        elif name and next(child.children(), None) is not None:
            handles.append(
                child.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: watch_module(name, args, kwargs), with_kwargs=True
                )
            )
    ids = torch.arange(NUM_TOKENS, device=module.device)[None]
    keep = {"logits_to_keep": torch.arange(NUM_HEAD_ROWS, device=module.device)} if keeps_logits else {}
    module(input_ids=ids, position_ids=ids, use_cache=False, **keep)
    for handle in handles:
        handle.remove()
    for child in module.modules():
        unbind(child)
    trial.attention = recorder.calls
    return trial
