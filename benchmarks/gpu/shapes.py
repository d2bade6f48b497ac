"""The models of the GPU benchmark: bases with random weights, and adapters of mixed ranks, generated on demand."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common.random_model import random_model as random_weights
from gpu_worker.adapters.loader.fetch import FetchedAdapter
from gpu_worker.adapters.weights import page_bytes, split_budget
from gpu_worker.layers.lora import GROUPS
from gpu_worker.model.model import BaseModel
from gpu_worker.model.prepare import prepare_model
from lora_kernels import ops
from lora_kernels.ops import PAGE_ROWS

B_STD = 0.01
"""Standard deviation of the matrices B: small but not zero, so that no system gains by skipping zeros."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A base model, and the size of the measurement."""

    name: str
    config: dict[str, Any]  # arguments of LlamaConfig
    dtype: torch.dtype
    num_seqs: tuple[int, ...]  # that decode together
    num_adapters: tuple[int, ...]  # distinct adapters among them
    ranks: tuple[int, ...]  # of the adapters, in turn
    prompt_tokens: int
    decode_steps: int
    rounds: int
    num_slots: int  # number of adapters that the small pool holds
    num_requests: int  # of a churn run
    stream_tokens: int  # of each stream that is measured during cold loads
    cold_per_s: float
    max_step_tokens: int


SHAPES = {
    "llama-3.1-8b": Shape(
        "Llama-3.1-8B", {
            "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        },
        torch.bfloat16, num_seqs=(32, 128), num_adapters=(1, 8, 32, 128), ranks=(8, 16, 32, 64), prompt_tokens=512,
        decode_steps=64, rounds=3, num_slots=8, num_requests=96, stream_tokens=400, cold_per_s=3.0,
        max_step_tokens=2048,
    ),
    "tiny": Shape(
        "a tiny Llama", {
            "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        },
        torch.float32, num_seqs=(4,), num_adapters=(1, 4), ranks=(8, 16, 24), prompt_tokens=20, decode_steps=4,
        rounds=1, num_slots=4, num_requests=12, stream_tokens=24, cold_per_s=50.0, max_step_tokens=64,
    ),
}  # fmt: skip


def names_of(num: int) -> list[str]:
    """Return the names of `num` adapters of mixed ranks; for 0, the name of the base."""
    return [f"mixed-{i}" for i in range(num)] or [""]


def equal_names(num: int, kind: str) -> list[str]:
    """Return the names of `num` adapters of rank 16."""
    return [f"{kind}-{i}-r16" for i in range(num)]


def random_model(shape: Shape, device: torch.device, impl: ops.Impl | None = None) -> BaseModel:
    """Return a prepared model with random weights. impl: kernels to use; None: the device's default."""
    with device:
        module = random_weights(LlamaForCausalLM, LlamaConfig(**shape.config), shape.dtype).eval()
    return prepare_model(module, frozenset(), impl)


class RandomAdapters:
    """Adapters of all linear layers by name; those of one rank share their weights and differ in `lora_alpha`."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        with torch.device("meta"):
            module = LlamaForCausalLM(LlamaConfig(**shape.config))
        head = module.get_output_embeddings()
        self.widths = {
            name: (part.in_features, part.out_features)
            for name, part in module.named_modules()
            if isinstance(part, nn.Linear) and part is not head
        }
        self.weights = functools.cache(self._weights)

    def rank(self, name: str) -> int:
        """Return the rank of an adapter."""
        _, index, *own = name.split("-")
        return int(own[0][1:]) if own else self.shape.ranks[int(index) % len(self.shape.ranks)]

    def num_pages(self, names: Sequence[str]) -> int:
        """Return the number of pages of a group that these adapters take together."""
        return sum(-(-self.rank(name) // PAGE_ROWS) for name in names if name)

    def _weights(self, rank: int) -> bytes:
        generator, tensors = torch.Generator().manual_seed(rank), dict[str, torch.Tensor]()
        for name, (width_in, width_out) in self.widths.items():
            prefix = f"base_model.model.{name}"
            a = torch.randn(rank, width_in, generator=generator) / width_in**0.5
            tensors[f"{prefix}.lora_A.weight"] = a.to(self.shape.dtype)
            b = torch.randn(width_out, rank, generator=generator) * B_STD
            tensors[f"{prefix}.lora_B.weight"] = b.to(self.shape.dtype)
        return save(tensors)

    def config(self, name: str) -> dict[str, Any]:
        """Return an adapter's adapter_config.json."""
        rank = self.rank(name)
        return {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_dropout": 0.0, "bias": "none",
            "lora_alpha": rank * (0.5 + (int(name.split("-")[1]) % 97) / 64),
            "target_modules": sorted({module.rpartition(".")[2] for module in self.widths}),
        }  # fmt: skip

    def fetch(self, name: str) -> FetchedAdapter:
        """Return an adapter's files."""
        return FetchedAdapter(self.config(name), self.weights(self.rank(name)))


def pool_bytes(model: BaseModel, num_pages: int) -> int:
    """Return a budget in bytes whose pool holds `num_pages` pages of each group of all layers, and hardly more."""
    sizes = [page_bytes(model.sites, group) for group in range(len(GROUPS))]
    budgets = itertools.count(num_pages * sum(sizes[:2]), max(1, max(sizes) // 4))
    return next(budget for budget in budgets if min(split_budget(sizes, budget)[:2]) >= num_pages)
