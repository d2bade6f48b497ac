"""The accuracy that lm-eval finds with exact inputs of quantised layers, and with inputs rounded to int8.

    make build/lm-eval/.stamp && python -m benchmarks.fleet.rounded_inputs [--kinds int4,int8] [--items 2000]

For each kind of weights and inputs `lorafleet up` starts a fleet on the quickstart's model, and lm-eval asks it by its
backend `local-completions`. The text is Python's language reference, from the standard library (`pydoc_data`), because
lm-eval's own data sets must be downloaded. Two tasks, each of 64 words of context:

- *words*: is the next word, of four letters or more, what the model would choose greedily, as in LAMBADA?
- *endings*: do the next 12 words get the highest likelihood of four endings, three of which are from elsewhere, as in
  HellaSwag?

The same items are asked each time, so the standard error is that of the paired difference.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from benchmarks.common import report
from benchmarks.common.fleet import quickstart_model, scratch_folder
from benchmarks.peers.servers import Server, first_model, running, up
from protocol.wire.lines import lines_of

PYTHON = Path("build/lm-eval/bin/python")
CONTEXT, ENDING, CHOICES = 64, 12, 4  # words, words, endings
MIN_LETTERS = 4

TASKS: dict[str, dict[str, Any]] = {
    "words": {"output_type": "loglikelihood", "doc_to_text": "{{text}}", "doc_to_target": "{{target}}"},
    "endings": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
    },
}


def documents(num: int, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Return up to `num` items of each task, the same ones each time."""
    words = " ".join(text for _, text in sorted(topics.items())).split()
    rng = random.Random(seed)
    starts = list(range(0, len(words) - CONTEXT - ENDING, 4))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in TASKS}
    for start in rng.sample(starts, len(starts)):
        text, after = " ".join(words[start : start + CONTEXT]), words[start + CONTEXT :]
        if after[0].isalpha() and len(after[0]) >= MIN_LETTERS and len(found["words"]) < num:
            found["words"].append({"text": text, "target": f" {after[0]}"})
        if len(found["endings"]) < num:
            far = [at for at in starts if abs(at - start) > CONTEXT + ENDING]
            others = [words[at : at + ENDING] for at in rng.sample(far, CHOICES - 1)]
            choices = [f" {' '.join(ending)}" for ending in (after[:ENDING], *others)]
            answer = rng.randrange(CHOICES)
            choices[0], choices[answer] = choices[answer], choices[0]
            found["endings"].append({"text": text, "choices": choices, "answer": answer})
    return found


def write_tasks(folder: Path, items: dict[str, list[dict[str, Any]]]) -> None:
    """Write lm-eval's task files."""
    folder.mkdir(parents=True)
    for name, docs in items.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        task = {"task": f"local_{name}", **source, **TASKS[name], "metric_list": [{"metric": "acc"}]}
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is valid YAML


def accuracies(url: str, tokenizer: Path, tasks: Path, out: Path) -> dict[str, list[float]]:
    """Return for each task whether lm-eval counts each item as right, 1.0 or 0.0."""
    model = f"model={first_model(url)},base_url={url}/v1/completions,tokenizer={tokenizer}"
    command = [
        str(PYTHON), "-m", "lm_eval", "--model", "local-completions", "--tasks", "local_words,local_endings",
        "--model_args", f"{model},tokenizer_backend=huggingface,num_concurrent=8,max_length=1024",
        "--include_path", str(tasks), "--output_path", str(out), "--log_samples", "--device", "cpu",
        "--batch_size", "8",
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out / "hf"), "OPENAI_API_KEY": "none"}
    subprocess.run(command, env={**os.environ, **offline, "TOKENIZERS_PARALLELISM": "false"}, check=True)
    found: dict[str, list[float]] = {}
    for name in TASKS:
        [samples] = out.glob(f"**/samples_local_{name}_*.jsonl")
        rows = [json.loads(line) for line in lines_of(samples.read_text())]
        found[name] = [float(row["acc"]) for row in sorted(rows, key=lambda row: row["doc_id"])]
    return found


def compared(kind: str, name: str, exact: Sequence[float], rounded: Sequence[float]) -> list[object]:
    """Return a row of the table: accuracies in percent, and their paired difference in points."""
    num, differences = len(exact), [100 * (b - a) for a, b in zip(exact, rounded, strict=True)]
    mean = sum(differences) / num
    error = math.sqrt(sum((one - mean) ** 2 for one in differences) / (num - 1) / num)
    percent = [f"{100 * sum(one) / num:.2f}" for one in (exact, rounded)]
    return [kind, name, num, *percent, f"{mean:+.2f} ± {error:.2f}", sum(one != 0 for one in differences)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default="int4,int8", help="kinds of weights (%(default)s)")
    parser.add_argument("--items", type=int, default=2000, help="items per task, at least 2 (%(default)s)")
    args = parser.parse_args()
    rows: list[list[object]] = []
    with scratch_folder() as scratch:
        model = quickstart_model()
        write_tasks(scratch / "tasks", documents(args.items))
        for kind in args.kinds.split(","):
            found: list[dict[str, list[float]]] = []
            for inputs, flag in (("exact", "--no-quantize-activations"), ("int8", "--quantize-activations")):
                command = [*up(model, scratch), "--quantization", kind, flag]
                log, out = scratch / f"{kind}-{inputs}.log", scratch / f"{kind}-{inputs}"
                with running(Server("Lorafleet", command, {}), log) as url:
                    found.append(accuracies(url, model, scratch / "tasks", out))
            rows += [compared(kind, name, found[0][name], found[1][name]) for name in TASKS]
    print(report.table(("weights", "task", "items", "exact, %", "int8, %", "points", "changed"), rows))


if __name__ == "__main__":
    main()
