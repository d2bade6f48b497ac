"""An int8 KV cache compared with bf16 on a CPU: effect on SmolLM2-135M's answers, and duration of steps.

    python -m benchmarks.engine.kv_cache [--errors | --short]

Decode steps of 1 and 8 sequences of 8,192 tokens: whole steps, their attention alone, and a read of the same number of
bytes (their sum, on all threads) alternate; figures are minimums. A sequence's blocks lie either in runs of 32, as a
worker gives them to prompts in chunks of 512 tokens, or anywhere, as in a fragmented cache. With --errors it measures
answers instead: the attention's outputs, the perplexity and the most probable tokens of the last 256 tokens of a text
(this project's documentation) of 512 and of 4,608 tokens. Times need an otherwise idle machine and take four minutes;
errors take three.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.common import report
from benchmarks.common.fleet import quickstart_model
from gpu_worker.loading.checkpoint import read_model
from gpu_worker.model.model import BaseModel
from gpu_worker.model.prepare import load_model
from lora_kernels import kv_codes, ops

CONTEXT, NUM_SEQS = 8192, (1, 8)
LENGTHS, LAST, CHUNK = (512, 4608), 256, 256
KINDS: dict[str, torch.dtype | None] = {"bfloat16": None, "int8": torch.int8}
RUNS = {"runs": 32, "anywhere": 1}  # name -> number of adjacent blocks
ROUNDS = 15


def allocate(model: BaseModel, dtype: torch.dtype | None, num_blocks: int) -> None:
    """Give a model zeroed caches of a dtype, whose memory pages exist."""
    model.kv_dtype = dtype
    for layer in model.layers:
        layer.allocate(num_blocks, model.cache_dtype, model.device)
        for cache in (layer.k_cache, layer.v_cache):
            assert cache is not None
            cache.zero_()


def caches_of(model: BaseModel) -> list[tuple[Tensor, Tensor]]:
    """Return the caches of all layers."""
    found = [(layer.k_cache, layer.v_cache) for layer in model.layers]
    return [(k, v) for k, v in found if k is not None and v is not None]


def least(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the minimum seconds of each call. Calls alternate, twice each: the first adapts layers to other caches."""
    best = dict.fromkeys(calls, math.inf)
    for _ in range(rounds):
        for name, call in calls.items():
            for _ in range(2):
                begin = time.perf_counter()
                call()
                best[name] = min(best[name], time.perf_counter() - begin)
    return best


def attend(caches: list[tuple[Tensor, Tensor]], q: Tensor, batch: ops.AttentionBatch) -> None:
    """Compute the attention of all layers of a step."""
    for k_cache, v_cache in caches:
        ops.paged_attention(q, k_cache, v_cache, batch, scale=q.shape[2] ** -0.5)


def step(model: BaseModel, caches: list[tuple[Tensor, Tensor]], batch: ops.AttentionBatch, ids: Tensor) -> None:
    """Compute a whole decode step over `caches`."""
    for layer, (k_cache, v_cache) in zip(model.layers, caches, strict=True):
        layer.k_cache, layer.v_cache = k_cache, v_cache
    model.context.attention = batch
    model.forward(ids, batch.positions, None)


def times(model: BaseModel, rounds: int) -> list[dict[str, Any]]:
    """Measure decode steps at long contexts."""
    points: list[dict[str, Any]] = []
    call = model.layers[0].call
    for num in NUM_SEQS:
        blocks = CONTEXT // ops.BLOCK_TOKENS
        batches: dict[str, ops.AttentionBatch] = {}
        for place, run in RUNS.items():
            firsts = run * np.random.default_rng(0).permutation(num * blocks // run)
            tables = (firsts[:, None] + np.arange(run)).reshape(num, blocks)
            batches[place] = ops.build_attention_batch(np.ones(num, int), np.full(num, CONTEXT), tables, "cpu")
        q = torch.randn(num, call.num_heads, call.head_dim).to(model.dtype)
        calls: dict[str, Callable[[], object]] = {}
        sizes: dict[str, int] = {}
        for kind, dtype in KINDS.items():
            allocate(model, dtype, num * blocks)
            caches = caches_of(model)
            sizes[kind] = sum(k.nbytes + v.nbytes for k, v in caches)
            for place, batch in batches.items():
                calls[f"{kind} {place} attention"] = partial(attend, caches, q, batch)
                calls[f"{kind} {place} step"] = partial(step, model, caches, batch, torch.ones(num, dtype=torch.int64))
        calls["read"] = partial(torch.sum, torch.ones(sizes["bfloat16"] // 4))
        best = least(calls, rounds)
        bandwidth = 1e-9 * sizes["bfloat16"] / best["read"]
        for kind, place in itertools.product(KINDS, RUNS):
            attention, whole = best[f"{kind} {place} attention"], best[f"{kind} {place} step"]
            size = sizes[kind]
            points.append({
                "sequences": num, "kind": kind, "blocks": place, "mib": size / (1 << 20), "step_ms": 1e3 * whole,
                "attention_ms": 1e3 * attention, "share": attention / whole, "gb_per_s": 1e-9 * size / attention,
                "read_gb_per_s": bandwidth, "of_read": 1e-9 * size / attention / bandwidth,
            })  # fmt: skip
    return points


def last_logits(model: BaseModel, ids: Tensor) -> Iterator[Tensor]:
    """Compute a text chunk by chunk; yield the logits [CHUNK, V] of its last chunks, LAST tokens in total."""
    table = np.arange(len(ids) // ops.BLOCK_TOKENS)[None]
    for end in range(CHUNK, len(ids) + 1, CHUNK):
        model.context.attention = ops.build_attention_batch(np.array([CHUNK]), np.array([end]), table, "cpu")
        logits = model.forward(ids[end - CHUNK : end], model.context.attention.positions, None)
        if end > len(ids) - LAST:
            yield logits.float()


def attention_error(folder: Path, ids: Tensor) -> float:
    """Return the relative error of transformers' fp32 attention with rounded keys and values, over all layers."""
    own, errors = ALL_ATTENTION_FUNCTIONS["sdpa"], list[float]()

    def rounded(x: Tensor) -> Tensor:
        codes, scales = kv_codes.encode(x)
        return codes.float() * scales[..., None]

    def both(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        exact = own(module, q, k, v, *args, **kwargs)
        off = own(module, q, rounded(k), rounded(v), *args, **kwargs)[0] - exact[0]
        errors.append(float(off[:, -LAST:].norm() / exact[0][:, -LAST:].norm()))
        return exact

    model = read_model(folder, torch.device("cpu"), torch.float32)
    model.set_attn_implementation("sdpa")
    ALL_ATTENTION_FUNCTIONS["sdpa"] = both
    try:
        model(input_ids=ids[None], use_cache=False, logits_to_keep=1)
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    return math.sqrt(sum(error**2 for error in errors) / len(errors))


def docs_ids(folder: Path) -> Tensor:
    """Return the tokens (int64 [N]) of this project's documentation in a model's tokenizer."""
    root = Path(__file__).parents[2] / "docs"
    text = "\n".join(path.read_text() for path in sorted(root.glob("*.md")))
    return torch.tensor(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids)


def save(points: list[dict[str, Any]], about: dict[str, Any], path: Path) -> None:
    """Print points, which share their field names, as a table, and write them as JSON."""
    rows = [[f"{cell:.4g}" if isinstance(cell, float) else cell for cell in point.values()] for point in points]
    print(report.table(list(points[0]), rows))
    report.save(path, about | {"points": points})


def errors(folder: Path, model: BaseModel) -> list[dict[str, Any]]:
    """Compare the answers of both kinds of caches."""
    all_ids = docs_ids(folder)
    points: list[dict[str, Any]] = []
    for length in LENGTHS:
        ids = all_ids[:length]
        targets, found = ids[length - LAST + 1 :], dict[str, Tensor]()
        for kind, dtype in KINDS.items():
            allocate(model, dtype, length // ops.BLOCK_TOKENS)
            found[kind] = torch.cat(list(last_logits(model, ids)))
        tokens = {kind: logits.argmax(-1) for kind, logits in found.items()}
        losses = {
            kind: float(torch.nn.functional.cross_entropy(logits[:-1], targets)) for kind, logits in found.items()
        }
        points.append({
            "tokens": length, "attention_error": attention_error(folder, ids),
            **{f"perplexity_{kind}": math.exp(loss) for kind, loss in losses.items()},
            "same_token": float((tokens["int8"] == tokens["bfloat16"]).float().mean()),
        })  # fmt: skip
    return points


def main() -> None:
    """Measure, print a table, and save the figures."""
    parser = report.parser(__doc__)
    parser.add_argument("--errors", action="store_true", help="what changes in answers, in place of times")
    args = parser.parse_args()
    about = report.native_machine()
    folder = args.model or quickstart_model()
    model = load_model(folder, torch.device("cpu"), torch.bfloat16, None)
    with torch.inference_mode():
        points = errors(folder, model) if args.errors else times(model, 5 if args.short else ROUNDS)
    save(points, about, args.out / ("kv_cache_errors" if args.errors else "kv_cache"))


if __name__ == "__main__":
    main()
