"""The base model as the engine uses it: a Hugging Face causal LM that runs packed steps. `prepare` creates it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gpu_worker.layers.adaptable_modules import AdaptableModules
from gpu_worker.layers.attention import PagedLayer, StepContext
from gpu_worker.layers.blocks import PlainModel
from gpu_worker.layers.lora import SharedInput, SiteInfo
from gpu_worker.layers.mixers import MixerStates, Run, StateBatch, running
from gpu_worker.model.kept_answers import KeptAnswers
from gpu_worker.model.logits_check import LogitsCheck, spread_of
from gpu_worker.one_by_one.passes import Passes
from gpu_worker.tasks.model_tasks import ModelTasks, decoder_of, hidden_states
from lora_kernels import cpu, ops
from protocol.wire.errors import BadRequest
from protocol.wire.messages import SiteShape


@dataclass(slots=True)
class BaseModel:
    """A loaded model; ready for packed steps once the caches of its layers are allocated."""

    module: PreTrainedModel
    device: torch.device
    dtype: torch.dtype
    context: StepContext
    layers: list[PagedLayer]
    sites: list[SiteInfo]
    shared: list[SharedInput]  # in the order of their sites
    adaptable: AdaptableModules
    eos_ids: frozenset[int]
    max_positions: int  # maximum tokens of a sequence; 0: no known limit
    fingerprint: str
    keeps_logits: bool  # whether the module's forward takes logits_to_keep
    num_shortcuts: int  # decoder layers that run by shortcut as a whole
    mixers: MixerStates  # none for a model whose layers keep keys and values only
    takes_positions: bool  # whether the module's forward takes position_ids
    tasks: ModelTasks
    width: int  # size of a hidden state; 0: unavailable
    check: LogitsCheck | None = None
    answers: KeptAnswers | None = None  # caches `check` for later starts, if enabled
    kv_dtype: torch.dtype | None = None  # dtype of keys and values in the caches, int8 for codes; None: `dtype`
    plain: PlainModel | None = None  # replaces the module in steps
    idle: list[SiteShape] = field(default_factory=list[SiteShape])  # see `ServedModel.idle`
    rounds_inputs: bool = False  # whether quantized layers round their inputs to int8
    passes: Passes | None = None  # set for models whose sequences run unbatched; these have no `layers` and no `mixers`

    def keep_answers(self) -> None:
        """Cache the untouched model's answers, once the engine has reproduced them, and free them."""
        if self.answers is not None and self.check is not None and self.passes is None:
            self.answers.write(self.check, self.width)
        self.check = None

    @property
    def cache_dtype(self) -> torch.dtype:
        """The dtype of keys and values in the engine's caches."""
        return self.kv_dtype or self.dtype

    @property
    def config(self) -> Any:
        """The Hugging Face config of the text model."""
        return self.module.config.get_text_config()

    @property
    def vocab_size(self) -> int:
        """The vocabulary size."""
        return self.config.vocab_size

    @property
    def prefix(self) -> list[int]:
        """The value of `ServedModel.prefix`; empty unless every layer has keys and values of one shape."""
        shapes = {(layer.call.num_kv_heads, layer.call.head_dim, layer.call.value_dim) for layer in self.layers}
        modules = {id(layer.call.module) for layer in self.layers if layer.owner is None}
        is_regular = len(self.layers) == len(modules) == self.config.num_hidden_layers and not self.mixers.calls
        if not is_regular or len(shapes) != 1:
            return []
        heads, entries, value_entries = shapes.pop()
        return [len(modules), heads, entries] if entries == value_entries else []

    def hidden_states(self, *, is_wanted: bool) -> AbstractContextManager[list[Tensor]]:
        """Return a context that collects the hidden states [1, T, D] of forward passes inside it, if wanted."""
        if not is_wanted:
            return contextlib.nullcontext([])
        decoder = decoder_of(self.module)
        assert decoder is not None
        return hidden_states(decoder)

    def forward(self, input_ids: Tensor, position_ids: Tensor, logit_rows: Tensor | None) -> Tensor:
        """Run the packed step that the context describes.

        input_ids, position_ids: int64 [T]. logit_rows: int64 [rows], the tokens whose logits are needed; None: all T.
        Returns the logits [rows, V]. Writes the step's keys and values to the KV cache.
        """
        if self.plain is not None and not self.plain.decoder.module._forward_hooks:  # hidden states are not collected
            return self.plain.run(input_ids, position_ids, logit_rows)
        inputs: dict[str, Any] = {"input_ids": input_ids[None], "use_cache": False}
        if self.takes_positions:
            inputs["position_ids"] = position_ids[None]
        if self.keeps_logits and logit_rows is not None:
            inputs["logits_to_keep"] = logit_rows
        with running(self.mixers) if self.mixers.calls else contextlib.nullcontext():
            logits = self.module(**inputs).logits[0]
        return logits if self.keeps_logits or logit_rows is None else logits[logit_rows]

    def packed_difference(self, num_blocks: int, num_states: int) -> float:
        """Return the difference between packed steps and the untouched model, as computed by `spread_of`.

        Runs the random prompts packed together and in two chunks. For the arguments see `packed_logits`.
        """
        check = self.check
        assert check is not None
        num = min(len(check.prompts), num_blocks, num_states or len(check.prompts))
        room = min(num_blocks // num * ops.BLOCK_TOKENS, self.max_positions or len(check.prompts[0]))
        prompts = [ids[:room] for ids in check.prompts[:num]]
        firsts = [len(ids) // 2 + 1 for ids in prompts]
        got = self.packed_logits(prompts, [firsts, [len(ids) for ids in prompts]], num_blocks, num_states)
        return spread_of(got, [rows[: len(ids)] for rows, ids in zip(check.logits, prompts, strict=False)])

    def packed_logits(
        self, texts: Sequence[Tensor], steps: Sequence[Sequence[int]], num_blocks: int, num_states: int
    ) -> list[Tensor]:
        """Return the logits [T, V] of texts (int64 [T] each) that are computed together, without adapters.

        steps: for each step, the tokens of each text computed after it; ascending, all after the last step. num_blocks,
        num_states: sizes of the caches, which must be allocated, with one extra state; the first ones are overwritten.
        They must suffice for the texts.
        """
        context, device, num = self.context, self.device, len(texts)
        context.lora = context.lora_logits = None
        context.extras = context.extras_logits = []
        parts: list[list[Tensor]] = [[] for _ in texts]
        starts = np.zeros(num, np.int64)
        for ends in map(np.asarray, steps):
            blocks = -(-ends // ops.BLOCK_TOKENS)
            table = np.zeros((num, blocks.max()), np.int32)
            for i in range(num):
                table[i, : blocks[i]] = i * (num_blocks // num) + np.arange(blocks[i])
            context.attention = ops.build_attention_batch(ends - starts, ends, table, device)
            self.mixers.batch = self._check_runs(starts, ends, zero=num_states)
            ids = torch.cat([ids[start:end] for ids, start, end in zip(texts, starts, ends, strict=True)])
            with torch.inference_mode():
                logits = self.forward(ids, context.attention.positions, torch.arange(len(ids), device=device))
            for part, new in zip(parts, logits.split((ends - starts).tolist()), strict=True):
                part.append(new)
            starts = ends
        return [torch.cat(part) for part in parts]

    def refuse_unless_fixed(self, num_blocks: int, num_states: int) -> None:
        """Raise BadRequest unless texts give the same bits alone and batched, whole and in chunks.

        For the arguments see `packed_logits`.
        """
        generator, room = torch.Generator().manual_seed(0), num_blocks // 3 * ops.BLOCK_TOKENS
        lengths = [min(num, room, self.max_positions or num) for num in (41, 19, 7)]
        texts = [torch.randint(self.vocab_size, (num,), generator=generator).to(self.device) for num in lengths]
        alone = [self.packed_logits([ids], [[len(ids)]], num_blocks, num_states)[0] for ids in texts]
        ways = {
            "beside others": [lengths],
            "in chunks": [[num // 2 + 1 for num in lengths], lengths],
            "token by token at its end": [[num - 1 for num in lengths], lengths],
        }
        for way, steps in ways.items():
            together = self.packed_logits(texts, steps, num_blocks, num_states)
            if not all(torch.equal(one, other) for one, other in zip(alone, together, strict=True)):
                kind = self.config.model_type
                raise BadRequest(f"deterministic is on, but {kind} computes a text {way} with other bits than alone")

    def _check_runs(self, starts: np.ndarray, ends: np.ndarray, zero: int) -> StateBatch | None:
        """Return the runs of chunks [start, end) of prompts, with states in the first slots; None without states.

        zero: slot of the empty state.
        """
        if not self.mixers.calls:
            return None
        firsts = np.cumsum(ends - starts) - (ends - starts)
        parts = enumerate(zip(firsts.tolist(), (ends - starts).tolist(), starts.tolist(), strict=True))
        runs = [Run(first, first + num, slot if start else zero, slot, num) for slot, (first, num, start) in parts]
        return StateBatch.of([], runs, [], self.device)


def choose_device(device: str) -> torch.device:
    """Return the device for the setting "auto", "cpu" or "cuda". Raises BadRequest for "cuda" without a CUDA device."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise BadRequest("device is cuda, but torch finds no CUDA device")
    return torch.device(device)


def choose_isa(kernels: str, device: torch.device) -> str:
    """Load the native CPU kernels and return their instruction set; "" if other kernels compute.

    kernels: the setting. Raises BadRequest for an instruction set that this machine does not support.
    """
    if kernels == "reference":
        return ""
    if kernels != "auto":
        if device.type != "cpu":
            raise BadRequest(f"kernels is {kernels}, which is an instruction set of CPUs; the device is {device.type}")
        try:
            cpu.set_isa(kernels)
        except ValueError as error:
            raise BadRequest(f"kernels is {kernels}: {error}") from error
    return cpu.isa() if device.type == "cpu" and cpu.load() else ""


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device has hardware bfloat16 multiplication."""
    found = torch.cpu.get_capabilities()
    return device.type == "cuda" or bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def choose_dtype(dtype: str, *, multiplies: bool, isa: str, is_encoder: bool) -> tuple[torch.dtype, str]:
    """Return the dtype for a setting, and the reason for it.

    multiplies: see `multiplies_bfloat16`. isa: the native CPU kernels' instruction set, "" if torch computes. Native
    kernels read 16-bit weights on any CPU: products of two bf16 numbers are exact in fp32, and half the bytes are read,
    for which a step waits. An encoder's attention is torch's, which is slow without hardware bf16.
    """
    if dtype != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[dtype], "as set"
    if multiplies:
        return torch.bfloat16, "native bfloat16 arithmetic"
    if isa and not is_encoder:
        return torch.bfloat16, "native kernels compute in fp32"
    return torch.float32, "this CPU has no bfloat16 arithmetic" + ("" if isa else ", and there are no native kernels")


def fingerprint_of(module: PreTrainedModel) -> str:
    """Return a hash (SHA-256, hex) of a model's config and of the names and shapes of all its weights."""
    config = module.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation"):
        config.pop(volatile, None)
    layout = sorted((name, list(weight.shape)) for name, weight in module.state_dict().items())
    text = json.dumps([config, layout], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
