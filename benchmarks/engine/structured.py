"""Whether the engine's answers follow JSON schemas, and the cost of token masks per step.

    python -m benchmarks.engine.structured [--model FOLDER] [--short]

Answers to 200 random schemas (`schemas.py`) are requested at once, and jsonschema checks each of them. Then decode
steps of 1, 8 and 32 sequences are timed, alternately with and without a grammar for every sequence.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import orjson
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from tokenizers import Tokenizer

from benchmarks.common import report
from benchmarks.common.fleet import quickstart_model
from benchmarks.common.schemas import random_schema
from gateway.grammars.notation import grammar_text
from gateway.grammars.structured import constraint_of
from gpu_worker.adapters.loader.fetch import FetchedAdapter
from gpu_worker.build import load_engine
from gpu_worker.engine.engine import Engine
from gpu_worker.planning.request import EngineRequest, TokenOutput
from protocol.runtime.settings import Settings
from protocol.wire.errors import NotFound
from protocol.wire.messages import Sampling

MAX_TOKENS = 700
PROMPT_TOKENS = 64
LONG: dict[str, Any] = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer"},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
}
"""The schema of a timed sequence, whose answer is longer than the measurement."""


def grammar_of(schema: dict[str, Any]) -> str:
    """Return the grammar that the gateway builds from a schema."""
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    constraint = constraint_of(form, None, Settings())
    assert constraint is not None
    return grammar_text(constraint)


def question(schema: dict[str, Any], tokenizer: Tokenizer) -> np.ndarray:
    """Return a prompt that asks for an example of a schema: int32 [num_tokens]."""
    text = (
        "<|im_start|>user\nWrite an example of a JSON object that follows this JSON schema. Answer with the object "
        f"alone.\n{json.dumps(schema)}<|im_end|>\n<|im_start|>assistant\n"
    )
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)


def run(engine: Engine, requests: list[EngineRequest]) -> dict[str, tuple[list[int], TokenOutput]]:
    """Run requests to their end; return each one's token ids and last output."""
    for request in requests:
        engine.add(request)
    ids: dict[str, list[int]] = {request.rid: [] for request in requests}
    ends: dict[str, TokenOutput] = {}
    while len(ends) < len(requests):
        for output in engine.step():
            ids[output.rid] += output.ids
            if output.finish:
                ends[output.rid] = output
    return {rid: (ids[rid], end) for rid, end in ends.items()}


def verdict(schema: dict[str, Any], text: str, end: TokenOutput) -> str:
    """Return "valid", or why an answer is not."""
    if end.error is not None:
        return end.error.message
    if end.finish != "stop":
        return "cut at the limit"
    try:
        answer = orjson.loads(text)
        Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER).validate(answer)
    except (orjson.JSONDecodeError, ValidationError) as error:
        return f"invalid: {str(error).splitlines()[0]}"
    return "valid"


def ask_for_schemas(engine: Engine, tokenizer: Tokenizer, num: int) -> tuple[Counter[str], list[str]]:
    """Return the number of answers by verdict, and the invalid answers."""
    schemas = [random_schema(Random(seed)) for seed in range(num)]
    requests = [
        EngineRequest(
            str(i), 1, "", question(schema, tokenizer), Sampling(temperature=0.7, seed=i), MAX_TOKENS,
            grammar=grammar_of(schema),
        )
        for i, schema in enumerate(schemas)
    ]  # fmt: skip
    answers = run(engine, requests)
    found: Counter[str] = Counter()
    bad: list[str] = []
    for i, schema in enumerate(schemas):
        ids, end = answers[str(i)]
        text = tokenizer.decode(ids)
        what = verdict(schema, text, end)
        found[what] += 1
        if what != "valid":
            bad.append(f"{what}: {json.dumps(schema)}: {text}")
    return found, bad


def step_ms(engine: Engine, grammar: str, num_seqs: int, num_steps: int, first: int) -> np.ndarray:
    """Return the times of decode steps of `num_seqs` sequences in ms: float64 [num_steps]."""
    random = np.random.default_rng(first)
    rids = [f"{first}-{i}" for i in range(num_seqs)]
    sampling = Sampling(temperature=0.0, ignore_eos=True)
    for rid in rids:
        prompt = random.integers(1000, 20000, PROMPT_TOKENS).astype(np.int32)
        engine.add(EngineRequest(rid, 1, "", prompt, sampling, 2 * num_steps + 100, grammar=grammar))
    while engine.stats().running < num_seqs or any(seq.num_pending != 1 for seq in engine.batcher.running):
        engine.step()
    times: list[float] = []
    for _ in range(num_steps):
        started = time.perf_counter()
        outputs = engine.step()
        times.append(1000 * (time.perf_counter() - started))
        assert len(outputs) == num_seqs
    for rid in rids:
        engine.cancel(rid)
    return np.array(times)


def no_adapter(digest: str) -> FetchedAdapter:
    """Raise NotFound: this benchmark uses the base model only."""
    raise NotFound(f"no adapter {digest}")


def main() -> None:
    """Measure, print a table, and save the figures."""
    args = report.parser(__doc__).parse_args()
    machine, model = report.machine(), Path(args.model or quickstart_model())
    thread, _ = load_engine(Settings(model=str(model), device="cpu", max_num_seqs=32), no_adapter)
    engine, tokenizer = thread.engine, Tokenizer.from_file(str(model / "tokenizer.json"))
    assert isinstance(engine, Engine)
    num_schemas, rounds, num_steps = (40, 2, 40) if args.short else (200, 6, 60)
    found, bad = ask_for_schemas(engine, tokenizer, num_schemas)
    print(f"{num_schemas} schemas: {dict(found)}")
    print("\n".join(bad))
    grammar = grammar_of(LONG)
    rows: list[tuple[object, ...]] = []
    figures: dict[str, Any] = {}
    for num_seqs in (1, 8, 32):
        times: dict[str, list[np.ndarray]] = {"": [], grammar: []}
        masks_s = engine.counters.mask_s
        for turn in range(rounds):
            for which, kept in times.items():
                kept.append(step_ms(engine, which, num_seqs, num_steps, first=1000 * num_seqs + turn))
        plain, guided = (float(np.median(np.concatenate(kept))) for kept in times.values())
        mask_ms = 1000 * (engine.counters.mask_s - masks_s) / (rounds * num_steps)
        figures[str(num_seqs)] = {"plain_ms": plain, "guided_ms": guided, "mask_ms": mask_ms}
        rows.append((num_seqs, f"{plain:.2f}", f"{guided:.2f}", f"{guided / plain:.3f}", f"{mask_ms:.2f}"))
    print(report.table(("sequences", "step, ms", "with a grammar on each", "ratio", "of it filling masks"), rows))
    report.save(args.out / "structured", {"machine": machine, "schemas": dict(found), "steps": figures})


if __name__ == "__main__":
    main()
