"""lm-evaluation-harness: two tiny custom tasks, on base and adapter, with the command.

`make lm-eval` is the strict comparison with transformers and PEFT; this tour uses the command as its users do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import Tour, differ, raises, same

QUESTIONS = [
    ("The capital of France is", [" Paris", " a fish"], 0),
    ("Two and two make", [" a boat", " four"], 1),
    ("Water is", [" wet", " square", " forty"], 0),
]
CHOICE = {
    "task": "tour_choice", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}", "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}  # fmt: skip
WORDS = {
    "task": "tour_words", "output_type": "generate_until", "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[answer]}}", "metric_list": [{"metric": "exact_match"}],
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "do_sample": False, "temperature": 0},
}  # fmt: skip


def evaluate(tour: Tour, folder: Path, kind: str, model: str, route: str, task: str, **arguments: object) -> list:
    """Return the model's answer to each question. Raises RuntimeError with the command's output if it fails."""
    out = folder / f"{kind}-{model}-{task}"
    given = {"model": model, "base_url": f"{tour.v1}{route}", "num_concurrent": 2, "max_retries": 1, **arguments}
    words = [
        sys.executable, "-m", "lm_eval", "run", "--model", kind, "--tasks", task, "--include_path", str(folder),
        "--model_args", ",".join(f"{name}={value}" for name, value in given.items()), "--output_path", str(out),
        "--log_samples",
    ]  # fmt: skip
    if "chat" in kind:
        words.append("--apply_chat_template")
    environment = {**os.environ, "OPENAI_API_KEY": tour.key, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder)}
    done = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True, timeout=280)
    found = [*out.rglob("samples_*.jsonl")]
    if done.returncode != 0 or not found:
        raise RuntimeError(f"lm_eval ended with {done.returncode}: {done.stdout}{done.stderr}")
    samples = sorted((json.loads(line) for line in found[0].read_text().splitlines()), key=lambda one: one["doc_id"])
    same(len(samples), len(QUESTIONS))
    return [sample["resps"] for sample in samples]


def main() -> None:
    """Run each task on each model. Loglikelihoods need the tokenizer: `TOKENIZER` is its folder or Hub id."""
    tour = Tour()
    tokenizer = os.environ.get("TOKENIZER")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [{"question": q, "choices": choices, "answer": answer} for q, choices, answer in QUESTIONS]
        (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for task in (CHOICE, WORDS):
            data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "test.jsonl")}}}
            (folder / f"{task['task']}.yaml").write_text(json.dumps({**task, **data, "test_split": "test"}))
        if tokenizer:
            with tour.check("local-completions: loglikelihoods of base and adapter"):
                said = []
                for model in (tour.base, tour.adapter):
                    found = evaluate(
                        tour, folder, "local-completions", model, "/completions", "tour_choice", tokenizer=tokenizer
                    )
                    assert all(float(one[0][0]) < 0 for resps in found for one in resps), found
                    said.append(found)
                differ(*said)
        with tour.check("local-chat-completions: generations of base and adapter"):
            route = "/chat/completions"
            differ(
                evaluate(tour, folder, "local-chat-completions", tour.base, route, "tour_words"),
                evaluate(tour, folder, "local-chat-completions", tour.adapter, route, "tour_words"),
            )
        with tour.check("errors"), raises(RuntimeError, "404", "nobody-has-this"):
            evaluate(tour, folder, "local-chat-completions", "nobody-has-this", "/chat/completions", "tour_words")
    tour.end()


if __name__ == "__main__":
    main()
