"""Tokens per second of the engine with a draft model, with prompt lookup only, and without drafts, alternately.

    python -m benchmarks.engine.draft_model [--model FOLDER] [--added N] [--drafts bfloat16,int8,int4] [--short]
    python -m benchmarks.engine.draft_model --head FOLDER

The base gives SmolLM2-135M's answers in the time of a larger model: after its 30 layers it has `--added` more. Their
output projections are zero, so they change no value, but their weights are read and multiplied all the same. The draft
model is SmolLM2-135M, unquantized, or quantized, which makes it faster and more often wrong. With `--head` the base is
the unchanged model, and a head of it drafts. The prompts are the questions of `examples/styles.json`, answered greedily
by the base and its three trained adapters, 1, 4 and 8 at once. Whenever one ends the next one begins, and the clock
stops when none is left to begin, so that all streams are busy while it runs. Only `Engine.step` runs, in this process;
all ways use the same engine and alternate. With one thread (`--threads 1`) its CPU time is measured, which other
processes affect less than the wall clock.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from benchmarks.common import report
from benchmarks.common.fleet import quickstart_model, scratch_folder
from gpu_worker.adapters.loader.fetch import FetchedAdapter
from gpu_worker.build import load_engine
from gpu_worker.engine.engine import Engine
from gpu_worker.loading.checkpoint import read_config
from gpu_worker.planning.request import EngineRequest
from gpu_worker.quantised.quantise import quantised_folder
from protocol.runtime.settings import Settings
from protocol.wire.messages import Sampling

EXAMPLES = Path(__file__).parents[2] / "examples"
ADAPTERS = ("pirate", "json", "haiku")
LOADS = {"base": [""], "adapters": ["", *ADAPTERS]}
WAYS = ("without", "lookup", "draft model")
STREAMS = (1, 4, 8)
MAX_TOKENS = 64
OWN_LAYERS = 30
TURNS = 3
"""Requests of each stream in a batch."""

COUNTED: tuple[str, ...] = ("output", "drafted", "accepted", "model_drafted", "model_accepted")


def add_layers(model: Path, num: int, folder: Path) -> None:
    """Write a Llama with more layers after its own, which change nothing, into a folder with its tokenizer."""
    source: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    config = source.config
    own, config.num_hidden_layers = OWN_LAYERS, OWN_LAYERS + num
    tensors = source.state_dict()
    for layer in range(own, own + num):
        for name, tensor in list(tensors.items()):
            start = f"model.layers.{layer % own}."
            if name.startswith(start):
                is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
                tensors[f"model.layers.{layer}.{name.removeprefix(start)}"] = (
                    torch.zeros_like(tensor) if is_output else tensor.clone()
                )
    with torch.device("meta"):
        made: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.load_state_dict(tensors, assign=True)
    made.tie_weights()
    made.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(model / file, folder / file)


def fetch(name: str) -> FetchedAdapter:
    """Return one of the example adapters, restricted to the base's own layers; its name is its digest."""
    folder = EXAMPLES / "adapters" / name
    config = orjson.loads((folder / "adapter_config.json").read_bytes())
    config["layers_to_transform"] = list(range(OWN_LAYERS))
    return FetchedAdapter(config, (folder / "adapter_model.safetensors").read_bytes())


def questions(tokenizer: Tokenizer) -> list[np.ndarray]:
    """Return the prompts, each int32 [num_tokens]."""
    styles = json.loads((EXAMPLES / "styles.json").read_text())
    texts = [pair["question"] for pair in styles["pirate"]]
    return [
        np.array(tokenizer.encode(
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False
        ).ids, np.int32)
        for text in texts
    ]  # fmt: skip


class Run:
    """The results of one way over all its batches."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """clock: returns seconds."""
        self.seconds = 0.0
        self._clock = clock
        self.tokens: list[list[int]] = []
        self.figures = dict.fromkeys((*COUNTED, "steps", "draft_s"), 0.0)

    def add(self, engine: Engine, requests: Sequence[EngineRequest], streams: int) -> None:
        """Run requests, `streams` at a time, and add the figures of the time in which all streams are busy."""
        before = self._totals(engine)
        ids: dict[str, list[int]] = {request.rid: [] for request in requests}
        waiting = deque(requests)
        started_s = self._clock()
        for _ in range(streams):
            engine.add(waiting.popleft())
        is_counting = True
        while engine.has_work:
            ended = 0
            for output in engine.step():
                if output.error is not None:
                    raise output.error
                ids[output.rid] += output.ids
                ended += bool(output.finish)
            if is_counting and ended > len(waiting):
                is_counting = False
                self.seconds += self._clock() - started_s
                for name, total in self._totals(engine).items():
                    self.figures[name] += total - before[name]
            for _ in range(min(ended, len(waiting))):
                engine.add(waiting.popleft())
        self.tokens += ids.values()

    def _totals(self, engine: Engine) -> dict[str, float]:
        counters = engine.counters
        own = {name: getattr(counters, f"num_{name}_tokens") for name in COUNTED}
        return {**own, "steps": counters.num_steps, "draft_s": counters.draft_s}

    def report(self, plain: Run) -> dict[str, Any]:
        """Return the figures, and their ratios to `plain`, the run without drafts."""
        figures = self.figures
        drafted, by_model = figures["drafted"], figures["model_drafted"]
        return {
            **figures,
            "tokens_per_s": figures["output"] / self.seconds,
            "ratio": plain.seconds / plain.figures["output"] * figures["output"] / self.seconds,
            "tokens_per_step": figures["output"] / figures["steps"],
            "right": figures["accepted"] / drafted if drafted else None,
            "model_right": figures["model_accepted"] / by_model if by_model else None,
            "same_texts": sum(own == other for own, other in zip(self.tokens, plain.tokens, strict=True)),
            "texts": len(self.tokens),
        }


def measure(base: Path, draft: Path, rounds: int, threads: int) -> dict[str, Any]:
    """Return the figures of each way, by load and number of streams. threads: 0 for all, 1 to measure CPU time."""
    settings = Settings(
        model=str(base), draft_model=str(draft), prefix_cache=False, max_model_len=1024, adapter_pool_bytes=512 << 20,
        kv_cache_bytes=1 << 30, threads=threads,
    )  # fmt: skip
    engine = load_engine(settings, fetch)[0].engine
    assert isinstance(engine, Engine)
    engine.finish_start()
    source, limits = engine.batcher.draft_model, engine.batcher.limits
    clock = time.thread_time if threads == 1 else time.perf_counter
    prompts = questions(Tokenizer.from_file(str(base / "tokenizer.json")))
    found: dict[str, Any] = {}
    number = 0
    for load, names in LOADS.items():
        for streams in STREAMS:
            runs = {way: Run(clock) for way in WAYS}
            first = -1 if streams == STREAMS[0] else 0  # -1 is a warm-up round
            for i in range(first, rounds):
                for way in WAYS if i % 2 else WAYS[::-1]:
                    engine.batcher.limits = replace(limits, max_draft_tokens=0) if way == WAYS[0] else limits
                    engine.batcher.draft_model = source if way == WAYS[-1] else None
                    requests: list[EngineRequest] = []
                    for k in range(TURNS * streams):
                        number += 1
                        prompt = prompts[(TURNS * streams * i + k) % len(prompts)]
                        sampling = Sampling(temperature=0, ignore_eos=True)
                        name = names[(i + k) % len(names)]
                        requests.append(EngineRequest(str(number), 1, name, prompt, sampling, MAX_TOKENS))
                    (runs[way] if i >= 0 else Run(clock)).add(engine, requests, streams)
            one = found[f"{load} {streams}"] = {way: run.report(runs[WAYS[0]]) for way, run in runs.items()}
            show(load, streams, one)
    return found


def show(load: str, streams: int, found: dict[str, dict[str, Any]]) -> None:
    """Print the figures of each way as a table."""
    names = ("tokens_per_s", "ratio", "tokens_per_step", "right", "model_right")
    rows = [
        (load, streams, way, *("" if one[name] is None else f"{one[name]:.2f}" for name in names),
         f"{one['same_texts']} of {one['texts']}")
        for way, one in found.items()
    ]  # fmt: skip
    header = ("load", "streams", "way", "tok/s", "ratio", "tokens a step", "right", "of the model", "same texts")
    print(report.table(header, rows), flush=True)


def main() -> None:
    """Measure, print tables and save the figures."""
    parser = report.parser(__doc__)
    parser.add_argument("--added", type=int, default=240, help="layers that the base has more (%(default)s)")
    parser.add_argument("--drafts", default="bfloat16,int8,int4", help="draft models, by their weights (%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="threads; with 1 of them its CPU time is measured")
    parser.add_argument("--head", type=Path, help="an EAGLE-3 head of the model, in place of draft models")
    args = parser.parse_args()
    machine, model = report.machine(), args.model or quickstart_model()
    found: dict[str, Any] = {}
    with scratch_folder() as scratch:
        add_layers(model, 0 if args.head else args.added, scratch / "base")
        kinds: Any = ["head"] if args.head else args.drafts.split(",")
        for kind in kinds:
            draft = args.head or (model if kind == "bfloat16" else quantised_folder(model, read_config(model), kind, 8))
            print("a head" if args.head else f"a draft model in {kind}", flush=True)
            found[kind] = measure(scratch / "base", draft, 2 if args.short else 6, args.threads)
    about = {"machine": machine, "added_layers": 0 if args.head else args.added, "drafts": found}
    report.save(args.out / ("draft-head" if args.head else "draft-model"), about)


if __name__ == "__main__":
    main()
