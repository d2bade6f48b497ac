"""The base model as the engine sees it: a Hugging Face causal LM that runs packed steps. `prepare` makes it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gpu_worker.model.adaptable_modules import AdaptableModules
from gpu_worker.model.attention import PagedLayer, StepContext
from gpu_worker.model.logits_check import LogitsCheck
from gpu_worker.model.lora import SharedInput, SiteInfo
from gpu_worker.model.mixers import MixerStates, running
from protocol.wire.errors import BadRequest


@dataclass(slots=True)
class BaseModel:
    """A loaded model, ready for packed steps once the caches of its layers are allocated."""

    module: PreTrainedModel
    device: torch.device
    dtype: torch.dtype
    context: StepContext
    layers: list[PagedLayer]
    sites: list[SiteInfo]
    shared: list[SharedInput]  # in the order of their sites
    adaptable: AdaptableModules
    eos_ids: frozenset[int]
    max_positions: int  # tokens of the longest sequence the model can serve; 0: no limit known
    fingerprint: str
    keeps_logits: bool  # whether the module's forward takes logits_to_keep
    num_shortcuts: int  # decoder layers that run by shortcut as a whole
    mixers: MixerStates  # none for a model whose layers keep keys and values only
    takes_positions: bool  # whether the module's forward takes position_ids
    check: LogitsCheck | None = None

    @property
    def config(self) -> Any:
        """The Hugging Face config of the text model."""
        return self.module.config.get_text_config()

    @property
    def vocab_size(self) -> int:
        """Tokens the model knows."""
        return self.config.vocab_size

    def forward(self, input_ids: Tensor, position_ids: Tensor, logit_rows: Tensor | None) -> Tensor:
        """Run the packed step that the context describes.

        input_ids, position_ids: int64 [T]. logit_rows: int64 [rows], the tokens whose logits are wanted; None: all T.
        Returns the logits [rows, V]. Writes the step's keys and values to the KV cache.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids[None], "use_cache": False}
        if self.takes_positions:
            inputs["position_ids"] = position_ids[None]
        if self.keeps_logits and logit_rows is not None:
            inputs["logits_to_keep"] = logit_rows
        with running(self.mixers) if self.mixers.calls else contextlib.nullcontext():
            logits = self.module(**inputs).logits[0]
        return logits if self.keeps_logits or logit_rows is None else logits[logit_rows]


def choose_device(device: str) -> torch.device:
    """Return the device for a setting of auto, cpu or cuda. Raises BadRequest for cuda where there is none."""
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


def fingerprint_of(module: PreTrainedModel) -> str:
    """Return a hash (sha256, hex) of a model's config and of the names and shapes of all its weights."""
    config = module.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation"):
        config.pop(volatile, None)
    layout = sorted((name, list(weight.shape)) for name, weight in module.state_dict().items())
    text = json.dumps([config, layout], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
