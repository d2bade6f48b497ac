"""Adapter rows in int8 compared with bf16: their error, and the duration of a decode step of distinct adapters.

    python -m benchmarks.engine.int8_rows [--model FOLDER] [--short] [--requests N]

Two engines run in this process, one with `--lora-dtype int8`. Errors, by rank: that of the product of A and B of all
linear layers, relative to the adapter's file; the share of equal greedy tokens, position by position; and the
perplexity of a text under the adapter, this checkout's README. Steps: both engines alternate, the minimum of eight
steps each, and the median of the pairs' ratios. The adapters are random.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from benchmarks.common import report
from benchmarks.common.fleet import make_adapters, quickstart_model, scratch_folder
from benchmarks.engine.distinct_adapters import NAMES, decode_ms, start_engine
from gpu_worker.adapters.packing.packer import row_sites
from gpu_worker.engine.engine import Engine
from gpu_worker.planning.request import EngineRequest
from protocol.wire.messages import Sampling

RANKS = (8, 16, 32, 64)
NUM_PROMPTS, PROMPT_TOKENS, NUM_TOKENS = 16, 64, 32
TEXT_TOKENS, NUM_TEXTS = 256, 8

HEADS = ("rank", "BA off, bf16", "int8", "tokens equal", "texts equal", "perplexity, bf16", "int8")


def delta_error(engine: Engine, name: str, file: Path) -> float:
    """Return |BA of the pool's rows - BA of the file| / |BA of the file|, over all linear layers."""
    adapter, sites = engine.adapters.host.get(name), engine.model.sites
    assert adapter is not None
    is_int8 = engine.adapters.weights.lora_sites[0].factors is not None
    exact = {key: tensor.float() for key, tensor in load_file(file).items()}
    off = size = 0.0
    for index, a, b, factors in adapter.rows.parts(row_sites(sites, int8=is_int8), adapter.ranks):
        prefix = f"base_model.model.{sites[index].name}"
        factors = factors if len(factors) else torch.ones(len(a))
        expected = exact[f"{prefix}.lora_B.weight"] @ exact[f"{prefix}.lora_A.weight"]
        off += float((b.float().T * factors @ a.float() - expected).square().sum())
        size += float(expected.square().sum())
    return (off / size) ** 0.5


def run(engine: Engine, requests: Sequence[EngineRequest]) -> dict[str, tuple[list[int], bytes]]:
    """Run requests together. Return each one's tokens, and its prompt's logprobs if requested."""
    found: dict[str, tuple[list[int], bytes]] = {request.rid: ([], b"") for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            if output.error:
                raise output.error
            ids, logprobs = found[output.rid]
            found[output.rid] = [*ids, *output.ids], logprobs + output.prompt_logprobs
        if not engine.can_step:
            time.sleep(0.001)  # for the threads that load adapters
    return found


def requests_of(name: str, prompts: Sequence[np.ndarray], num: int, *, scored: bool) -> list[EngineRequest]:
    """Return greedy requests for an adapter. scored: also request the prompts' logprobs."""
    sampling = Sampling(temperature=0, ignore_eos=True, prompt_logprobs=1 if scored else None)
    return [
        EngineRequest(rid=str(i), epoch=1, digest=name, prompt=prompt, sampling=sampling, max_new_tokens=num)
        for i, prompt in enumerate(prompts)
    ]


def perplexity(engine: Engine, name: str, texts: Sequence[np.ndarray]) -> float:
    """Return the perplexity of texts under an adapter."""
    found = run(engine, requests_of(name, texts, 1, scored=True))
    logprobs = [np.frombuffer(raw, "<f4").reshape(TEXT_TOKENS, -1)[1:, 0] for _, raw in found.values()]
    return float(np.exp(-np.concatenate(logprobs).mean()))


def errors(engines: dict[str, Engine], adapters: Path, tokenizer: Tokenizer) -> list[tuple[str, ...]]:
    """Return a row of the table for each rank."""
    ids = np.array(tokenizer.encode(Path("README.md").read_text()).ids, np.int32)
    texts = list(ids[: NUM_TEXTS * TEXT_TOKENS].reshape(-1, TEXT_TOKENS))
    prompts = [text[:PROMPT_TOKENS] for text in ids[: NUM_PROMPTS * 100].reshape(NUM_PROMPTS, -1)]
    rows: list[tuple[str, ...]] = []
    for rank in RANKS:
        name = f"rank-{rank}"
        tokens = [run(engine, requests_of(name, prompts, NUM_TOKENS, scored=False)) for engine in engines.values()]
        pairs = [(np.array(tokens[0][rid][0]), np.array(tokens[1][rid][0])) for rid in tokens[0]]
        off = [delta_error(e, name, adapters / name / "adapter_model.safetensors") for e in engines.values()]
        perplexities = [perplexity(engine, name, texts) for engine in engines.values()]
        rows.append((
            str(rank), *(f"{error:.3%}" for error in off), f"{np.mean([(a == b).mean() for a, b in pairs]):.3f}",
            f"{sum((a == b).all() for a, b in pairs)} of {len(pairs)}", *(f"{value:.3f}" for value in perplexities),
        ))  # fmt: skip
    return rows


def main() -> None:
    """Measure, print two tables, and save the figures."""
    parser = report.parser(__doc__)
    parser.add_argument("--requests", type=int, default=len(NAMES), help="at once, each of its own adapter")
    args = parser.parse_args()
    model, num = args.model or quickstart_model(), args.requests
    rounds, names = 3 if args.short else 24, NAMES[: args.requests]
    with scratch_folder() as scratch:
        adapters = scratch / "adapters"
        make_adapters(model, adapters, names, [16])
        make_adapters(model, adapters, [f"rank-{rank}" for rank in RANKS], RANKS)
        sizes = {"kv_cache_bytes": 1 << 29, "adapter_pool_bytes": 1 << 30}
        engines = {dtype: start_engine(model, adapters, lora_dtype=dtype, **sizes) for dtype in ("auto", "int8")}
        for engine in engines.values():
            decode_ms(engine, names, 8, num)  # loads the adapters
        table = errors(engines, adapters, Tokenizer.from_file(str(model / "tokenizer.json")))
        print(report.table(HEADS, table), flush=True)
        least: dict[str, list[float]] = {dtype: [] for dtype in engines}
        for i in range(rounds):
            for dtype in ("auto", "int8")[:: 1 if i % 2 else -1]:
                least[dtype].append(min(decode_ms(engines[dtype], names, 8, num)))
    ratio = float(np.median(np.array(least["int8"]) / np.array(least["auto"])))
    steps = {dtype: min(values) for dtype, values in least.items()}
    print(report.table((f"{num} requests", "step, ms"), [(dtype, f"{ms:.2f}") for dtype, ms in steps.items()]))
    print(f"int8 beside bf16, median of {rounds} pairs: {ratio:.3f}")
    figures = {"machine": report.machine(), "requests": num, "step_ms": steps, "ratio": ratio, "errors": table}
    report.save(args.out / f"int8-rows-{num}", figures)


if __name__ == "__main__":
    main()
