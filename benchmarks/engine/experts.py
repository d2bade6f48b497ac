"""A step with LoRA on all experts of a mixture: as rows of the pool, and by running the modules again, alternately.

    python -m benchmarks.engine.experts [--short]

The base has Qwen3-30B-A3B's layers (128 experts, 8 of them per token, 2,048 and 768 wide, random bf16 weights), as many
as memory allows. Adapters have rank 16 on every expert of every layer. Only `Engine.step` is measured, in this process,
without HTTP and queue. The two ways are two engines over the same weights that alternate, so that other load on the
machine slows both. The figures are medians of whole steps.
"""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.common import report
from benchmarks.common.random_model import random_model
from benchmarks.engine.distinct_adapters import steps_ms
from gpu_worker.adapters.loader.fetch import FetchedAdapter
from gpu_worker.build import build_engine
from gpu_worker.engine.engine import Engine
from gpu_worker.model.prepare import prepare_model
from protocol.runtime.settings import Settings

RANK = 16
NAMES = ("a", "b")
CASES: dict[str, list[str]] = {
    "1 request, the base": [""],
    "1 request, an adapter": ["a"],
    "8 requests, the base": [""] * 8,
    "8 requests, an adapter": ["a"] * 8,
    "8 requests, two adapters and the base": ["a", "b", "", "a", "b", "", "a", "b"],
}
KINDS = ("a step of prompts", "a decode step")


def shape(*, short: bool) -> Qwen3MoeConfig:
    """Return the base's shape: two of the mixture's 48 layers."""
    small: dict[str, Any] = {"num_experts": 16, "hidden_size": 256, "moe_intermediate_size": 96} if short else {}
    values: dict[str, Any] = {
        "vocab_size": 1024, "hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 6144,
        "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "max_position_embeddings": 4096,
    }  # fmt: skip
    return Qwen3MoeConfig(**values | small)


def make_adapter(config: Qwen3MoeConfig, seed: int) -> FetchedAdapter:
    """Return an adapter as PEFT saves it for fused experts."""
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(config.num_hidden_layers):
        # PEFT wraps the module once per parameter, with the first parameter innermost.
        wrapped = (("base_layer.", hidden, 2 * inner), ("", inner, hidden))
        for inside, width_in, width_out in wrapped:
            name = f"base_model.model.model.layers.{layer}.mlp.experts.{inside}lora_"
            rows = RANK * config.num_experts
            tensors[f"{name}A.weight"] = torch.randn(rows, width_in, generator=generator).bfloat16() / 64
            tensors[f"{name}B.weight"] = torch.randn(width_out, rows, generator=generator).bfloat16() / 64
    fields = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=[], task_type="CAUSAL_LM",
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    ).to_dict()  # fmt: skip
    return FetchedAdapter({key: list(v) if isinstance(v, set) else v for key, v in fields.items()}, save(tensors))


def start_engine(model: Any, adapters: dict[str, FetchedAdapter], *, grouped: bool) -> Engine:
    """Return an engine over a model, which it modifies."""
    settings = Settings(
        model="mixture", dtype="bfloat16", prefix_cache=False, kv_cache_bytes=64 << 20, adapter_pool_bytes=64 << 20,
        adapter_extra_bytes=1 << 30, max_step_tokens=512,
    )  # fmt: skip
    prepared = prepare_model(model, frozenset(), None)
    if not grouped:
        prepared.adaptable.experts = {}  # so that no rows are packed for them
    return build_engine(prepared, settings, adapters.__getitem__, None)[0]


def main() -> None:
    """Measure, and print a table."""
    args = report.parser(__doc__, without=("model", "out")).parse_args()
    about = report.machine()
    config = shape(short=args.short)
    adapters = {name: make_adapter(config, seed) for seed, name in enumerate(NAMES)}
    engines = {
        way: start_engine(random_model(Qwen3MoeForCausalLM, shape(short=args.short)), adapters, grouped=way == "rows")
        for way in ("again", "rows")
    }
    num_steps, rounds = (3, 2) if args.short else (3, 3)
    for engine in engines.values():  # loads every adapter and takes every path once
        steps_ms(engine, [*NAMES, ""], 1, len(NAMES) + 1)
    times: dict[tuple[str, str, str], list[float]] = {}
    for _ in range(rounds):
        for case, digests in CASES.items():
            for way, engine in engines.items():
                for kind, own in zip(KINDS, steps_ms(engine, digests, num_steps, len(digests)), strict=True):
                    times.setdefault((case, kind, way), []).extend(own)
    rows: list[tuple[str, ...]] = []
    for case, kind in itertools.product(CASES, KINDS):
        again, own = (statistics.median(times[case, kind, way]) for way in engines)
        rows.append((case, kind, f"{again:.1f}", f"{own:.1f}", f"{again / own:.2f}"))
    print(about)
    print(report.table(("step", "", "run again, ms", "rows, ms", "times as fast"), rows))


if __name__ == "__main__":
    main()
