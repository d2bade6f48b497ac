"""lm-eval's `local-completions` with a fleet gives the results of its own `hf` backend with PEFT, in float32.

lm-eval needs its own environment: `make lm-eval` creates it and runs this.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from helpers.fleets import tiny_fleet

from chaos.fleet import ProcessFleet

PYTHON = Path(__file__).parents[2] / "build" / "lm-eval" / "bin" / "python"
MAX_LENGTH = 128  # tokens of a window in lm-eval
TOLERANCE = 1e-4
FLOAT32 = 1.2e-7  # precision of the sums in which `hf` adds a text's tokens
ADAPTERS = ("one", "two")

SENTENCES = (
    "The sea is", "A cat that sleeps", "Of all the birds the owl", "Nobody knows why", "In winter the lake", "Seven",
    "She opened the door and", "It rains, but", "Bread is made of", "At night",
)  # fmt: skip
LONG = " ".join(
    f"{sentence} what it was before, and so it went on for {i} days." for i, sentence in enumerate(SENTENCES)
)
TASKS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "tiny_loglikelihood": (
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{target}}",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
        [{"text": sentence, "target": f" {sentence[::-1]}<|end|>"[: 3 + i]} for i, sentence in enumerate(SENTENCES)],
    ),
    "tiny_rolling": (
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        [{"text": LONG[: 90 * i + 5]} for i in range(7)],
    ),
    "tiny_choice": (
        {
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{text}}?\nAnswer:",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        [
            {"text": sentence, "choices": ["yes", "no", "perhaps, or not", sentence], "answer": i % 4}
            for i, sentence in enumerate(SENTENCES)
        ],
    ),
    "tiny_generate": (
        {
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{text}}",
            "generation_kwargs": {"until": ["\n\n", "zz", "?"], "max_gen_toks": 24, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
        [{"text": sentence} for sentence in SENTENCES],
    ),
}
"""Task -> its configuration and documents. Some windows exceed `MAX_LENGTH`; some targets end their texts."""

pytestmark = [pytest.mark.lm_eval, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ProcessFleet]:
    folder: Path = tmp_path_factory.mktemp("fleet")
    write_tasks(folder / "tasks")
    async with tiny_fleet(folder, ADAPTERS) as running:
        yield running


def write_tasks(folder: Path) -> None:
    folder.mkdir()
    for name, (config, docs) in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps({"id": i, **doc}) + "\n" for i, doc in enumerate(docs)))
        files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **files, **config}))  # JSON is valid YAML


async def evaluate(fleet: ProcessFleet, out: Path, backend: str, **arguments: object) -> dict[tuple[str, int], Any]:
    """Return the results of an lm-eval backend for each document of each task."""
    command = [
        str(PYTHON), "-m", "lm_eval", "--model", backend, "--tasks", ",".join(TASKS),
        "--model_args", ",".join(f"{name}={value}" for name, value in arguments.items()),
        "--include_path", str(fleet.folder / "tasks"), "--output_path", str(out), "--log_samples", "--device", "cpu",
        "--batch_size", "4",
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(fleet.folder / "hf")}
    environment = {**os.environ, **offline, "TOKENIZERS_PARALLELISM": "false", "OPENAI_API_KEY": "none"}
    process = await asyncio.create_subprocess_exec(
        *command, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    told, _ = await process.communicate()
    assert process.returncode == 0, told.decode()[-4000:]
    return samples_in(out)


def samples_in(out: Path) -> dict[tuple[str, int], Any]:
    found: dict[tuple[str, int], Any] = {}
    for name in TASKS:
        [samples] = out.glob(f"**/samples_{name}_*.jsonl")
        for line in samples.read_text().splitlines():
            sample = json.loads(line)
            found[name, sample["doc_id"]] = sample["resps"]
    assert len(found) == sum(len(docs) for _, docs in TASKS.values())
    return found


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    """Return the results of `hf` by adapter."""
    return {}


@pytest.mark.parametrize("name", ["base", *ADAPTERS])
async def test_local_completions_is_hf_with_peft(
    fleet: ProcessFleet, tmp_path: Path, answers: dict[str, Any], name: str
) -> None:
    model = fleet.folder / "model"
    peft = {} if name == "base" else {"peft": fleet.folder / "adapters" / name}
    expected = await evaluate(
        fleet, tmp_path / "hf", "hf", pretrained=model, dtype="float32", max_length=MAX_LENGTH, **peft
    )
    found = await evaluate(
        fleet, tmp_path / "fleet", "local-completions", model=name, base_url=f"{fleet.url}/v1/completions",
        tokenizer=model, tokenizer_backend="huggingface", num_concurrent=4, max_length=MAX_LENGTH + 2,
    )  # fmt: skip
    for (task, doc), right in expected.items():
        got = found[task, doc]
        assert len(got) == len(right)
        for ours, theirs in zip(got, right, strict=True):
            check_one(task, doc, ours[0], theirs[0])
    answers[name] = expected
    others = [other for other in answers if other != name]
    for other in others:
        assert all(answers[other][key] != expected[key] for key in expected), f"{name} must change {other}'s answers"


def check_one(task: str, doc: int, ours: Any, theirs: Any) -> None:
    if task == "tiny_generate":
        assert ours == theirs, (task, doc)
    elif task == "tiny_rolling":
        assert float(ours) == pytest.approx(float(theirs), abs=TOLERANCE, rel=FLOAT32), (task, doc)
    else:
        assert float(ours[0]) == pytest.approx(float(theirs[0]), abs=TOLERANCE), (task, doc)
        assert str(ours[1]) == str(theirs[1]), (task, doc)
