"""Quantized layers with int8 inputs on a CPU, compared with exact inputs: effect on answers, and duration of steps.

    python -m benchmarks.engine.int8_activations [--errors | --accuracy] [--short] [--model FOLDER]

The model is SmolLM2-135M in bf16 with the layers of `--quantization int4` (Q4_0, the head Q8_0) and `int8` (Q8_0), each
with and without `--quantize-activations`. Times are of a prompt of 512 tokens, and of decode steps of 1, 8 and 32
sequences of 64 tokens; all four models alternate, and figures are minimums. The machine should be idle otherwise. With
--errors it measures answers instead: the perplexity and the most probable tokens of the last 256 tokens of a text (this
project's documentation) of 512 and of 4,608 tokens; and how many of 48 greedy tokens after 16 beginnings agree before
the first difference. With --accuracy it measures how often the most probable token is the next one of a text, Python's
language reference, in pieces of 512 tokens: with exact sums (`--deterministic`), with weights that are rounded to bf16
for many rows where tile registers multiply them, and with int8 inputs. All get the same tokens, so the standard error
is that of the paired difference to exact sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.common import report
from benchmarks.common.fleet import quickstart_model
from benchmarks.engine.kv_cache import LAST, LENGTHS, allocate, docs_ids, last_logits, least, save
from gpu_worker.loading.checkpoint import read_config
from gpu_worker.model.model import BaseModel
from gpu_worker.model.prepare import load_model
from gpu_worker.quantised.quantise import quantised_folder
from lora_kernels import ops

PROMPT, CONTEXT, NUM_SEQS = 512, 64, (1, 8, 32)
BEGINNINGS, BEGINNING, GREEDY = 16, 32, 48
ROUNDS = 15
PIECE, UNCOUNTED = 512, 64  # tokens of a text, and those of each piece that have too few before them
Models = dict[str, dict[str, BaseModel]]


def load(folder: Path) -> Models:
    """Return the models by quantization, then by kind of inputs."""
    config = read_config(folder)
    found: Models = {}
    for kind in ("int4", "int8"):
        made = quantised_folder(folder, config, kind, 4)
        found[kind] = {
            inputs: load_model(made, torch.device("cpu"), torch.bfloat16, None, rounds_inputs=inputs == "int8")
            for inputs in ("exact", "int8")
        }
    return found


def step(model: BaseModel, batch: ops.AttentionBatch, ids: Tensor, num: int) -> Tensor:
    """Compute a step of `num` sequences; return the logits of each one's last token."""
    model.context.attention = batch
    new = len(ids) // num
    return model.forward(ids, batch.positions, torch.arange(new - 1, len(ids), new))


def batch_of(num: int, new: int, total: int) -> ops.AttentionBatch:
    """Return a step of `num` sequences with `total` tokens each, of which `new` are new."""
    blocks = -(-total // ops.BLOCK_TOKENS)
    tables = np.arange(num * blocks).reshape(num, blocks)
    return ops.build_attention_batch(np.full(num, new), np.full(num, total), tables, "cpu")


def times(models: Models, rounds: int) -> list[dict[str, Any]]:
    """Measure a prompt and decode steps."""
    steps = {f"prompt of {PROMPT}": (1, PROMPT, PROMPT)} | {f"{num} rows": (num, 1, CONTEXT) for num in NUM_SEQS}
    points: list[dict[str, Any]] = []
    for name, (num, new, total) in steps.items():
        calls: dict[str, Callable[[], object]] = {}
        for kind, by_inputs in models.items():
            for inputs, model in by_inputs.items():
                allocate(model, None, num * -(-total // ops.BLOCK_TOKENS))
                calls[f"{kind} {inputs}"] = partial(
                    step, model, batch_of(num, new, total), torch.ones(num * new).long(), num
                )
        best = least(calls, rounds)
        for kind in models:
            exact, rounded = (1e3 * best[f"{kind} {inputs}"] for inputs in ("exact", "int8"))
            points.append({"step": name, "weights": kind, "ms": exact, "int8_ms": rounded, "ratio": rounded / exact})
    return points


def greedy(model: BaseModel, beginnings: Tensor) -> Tensor:
    """Return GREEDY tokens after each of the beginnings [num, BEGINNING], computed as one batch."""
    num, total = len(beginnings), BEGINNING + GREEDY
    blocks = -(-total // ops.BLOCK_TOKENS)
    allocate(model, None, num * blocks)
    tables, ids, found = np.arange(num * blocks).reshape(num, blocks), beginnings, list[Tensor]()
    for length in range(BEGINNING, total):
        batch = ops.build_attention_batch(np.full(num, ids.shape[1]), np.full(num, length), tables, "cpu")
        ids = step(model, batch, ids.flatten(), num).float().argmax(-1)[:, None]
        found.append(ids)
    return torch.cat(found, dim=1)


def errors(models: Models, all_ids: Tensor) -> list[dict[str, Any]]:
    """Compare the answers of int8 inputs with those of exact inputs."""
    points: list[dict[str, Any]] = []
    beginnings = all_ids[: BEGINNINGS * LAST].view(BEGINNINGS, LAST)[:, :BEGINNING]
    for kind, by_inputs in models.items():
        exact, rounded = (greedy(by_inputs[inputs], beginnings) for inputs in ("exact", "int8"))
        same = (exact == rounded).int().cumprod(1).sum(1)
        for length in LENGTHS:
            ids, logits = all_ids[:length], dict[str, Tensor]()
            for inputs, model in by_inputs.items():
                allocate(model, None, length // ops.BLOCK_TOKENS)
                logits[inputs] = torch.cat(list(last_logits(model, ids)))
            targets = ids[length - LAST + 1 :]
            perplexities = {
                f"perplexity_{inputs}": math.exp(torch.nn.functional.cross_entropy(own[:-1], targets))
                for inputs, own in logits.items()
            }
            same_token = (logits["exact"].argmax(-1) == logits["int8"].argmax(-1)).float().mean()
            points.append({
                "weights": kind, "tokens": length, **perplexities, "same_token": float(same_token),
                "greedy_same": float(same.float().mean()), "greedy_all_same": int((same == GREEDY).sum()),
            })  # fmt: skip
    return points


def reference_ids(folder: Path) -> Tensor:
    """Return the tokens (int64 [num, PIECE]) of Python's language reference in a model's tokenizer."""
    text = "\n".join(text for _, text in sorted(topics.items()))
    ids = torch.tensor(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids)
    return ids[: len(ids) // PIECE * PIECE].view(-1, PIECE)


def accuracy(models: Models, pieces: Tensor) -> list[dict[str, Any]]:
    """Count how often the most probable token is the next one of the text. pieces: int64 [num, PIECE]."""
    points: list[dict[str, Any]] = []
    for kind, by_inputs in models.items():
        ways = {
            "exact": (by_inputs["exact"], True),
            "exact, many rows": (by_inputs["exact"], False),
            "int8": (by_inputs["int8"], False),
        }
        right: dict[str, Tensor] = {}
        losses: dict[str, float] = {}
        for way, (model, is_exact) in ways.items():
            ops.fix_sums(is_exact)
            allocate(model, None, PIECE // ops.BLOCK_TOKENS)
            found, lost = list[Tensor](), list[Tensor]()
            for ids in pieces:
                model.context.attention = batch_of(1, PIECE, PIECE)
                logits = model.forward(ids, model.context.attention.positions, torch.arange(UNCOUNTED, PIECE - 1))
                targets = ids[UNCOUNTED + 1 :]
                found.append(logits.argmax(-1) == targets)
                lost.append(torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none"))
            right[way], losses[way] = 100 * torch.cat(found).double(), float(torch.cat(lost).double().mean())
        for way, own in right.items():
            more = own - right["exact"]
            points.append({
                "weights": kind, "inputs": way, "tokens": len(own), "right_percent": float(own.mean()),
                "points": float(more.mean()), "standard_error": float(more.std() / len(more) ** 0.5),
                "changed": int(more.count_nonzero()), "perplexity": math.exp(losses[way]),
            })  # fmt: skip
    return points


def main() -> None:
    """Measure, print a table, and save the figures."""
    parser = report.parser(__doc__)
    parser.add_argument("--errors", action="store_true", help="what changes in answers, in place of times")
    parser.add_argument("--accuracy", action="store_true", help="how often the next token is predicted, likewise")
    args = parser.parse_args()
    about = report.native_machine()
    folder = args.model or quickstart_model()
    models = load(folder)
    with torch.inference_mode():
        if args.errors:
            name, points = "int8_activations_errors", errors(models, docs_ids(folder))
        elif args.accuracy:
            pieces = reference_ids(folder)
            name, points = "int8_activations_accuracy", accuracy(models, pieces[:8] if args.short else pieces)
        else:
            name, points = "int8_activations", times(models, 5 if args.short else ROUNDS)
    save(points, about, args.out / name)


if __name__ == "__main__":
    main()
