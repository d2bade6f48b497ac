"""NVIDIA's AIPerf: a short measurement of base and adapter, chats whole and streamed; every request must succeed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import MAX_TOKENS, Tour, raises, same

NUM_REQUESTS = 6


def profile(tour: Tour, model: str, kind: str, *, streaming: bool) -> list[dict]:
    """Return AIPerf's records of a few requests, two at a time. Raises RuntimeError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        records = [{"text": f"Count to {i}."} for i in range(NUM_REQUESTS)]
        config = {
            "schemaVersion": "2.0",
            "benchmark": {
                "models": [model],
                "endpoint": {
                    "urls": [tour.url], "type": kind, "streaming": streaming, "apiKey": "${KEY:none}",
                    "useServerTokenCount": True, "extra": {"max_tokens": MAX_TOKENS, "temperature": 0},
                },
                # Its default tokenizer is downloaded from OpenAI. The server counts the tokens in any case.
                "tokenizer": {"name": os.environ.get("TOKENIZER") or "builtin"},
                "dataset": {"type": "file", "format": "single_turn", "records": records},
                "profiling": {"type": "concurrency", "requests": NUM_REQUESTS, "concurrency": 2},
                "artifacts": {"dir": folder, "records": ["jsonl"]},
            },
        }  # fmt: skip
        path = Path(folder, "config.yaml")  # a command line would expose the key
        path.write_text(json.dumps(config))  # JSON is YAML too
        words = [str(Path(sys.executable).with_name("aiperf")), "profile", "--config", str(path), "--ui-type", "none"]
        environment = {**os.environ, "KEY": tour.key}
        done = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True, timeout=240)
        found = [*Path(folder).rglob("profile_export.jsonl")]
        if done.returncode != 0 or not found:
            raise RuntimeError(f"aiperf ended with {done.returncode}: {(done.stdout + done.stderr)[-4000:]}")
        return [json.loads(line) for line in found[0].read_text().splitlines()]


def main() -> None:
    """Measure each model, streamed and whole."""
    tour = Tour()
    for name, model, kind, streaming in (
        ("base", tour.base, "chat", True),
        ("adapter", tour.adapter, "chat", False),
        ("adapter", tour.adapter, "completions", True),
    ):
        with tour.check(f"{kind}, {'streamed' if streaming else 'whole'}, {name}"):
            records = profile(tour, model, kind, streaming=streaming)
            same([record["error"] for record in records if record.get("error")], [])
            same(len(records), NUM_REQUESTS)
            for record in records:
                assert 0 < record["metrics"]["output_sequence_length"]["value"] <= MAX_TOKENS, record
    with tour.check("errors"), raises(RuntimeError, f"All {NUM_REQUESTS} inference request(s) failed"):
        profile(tour, "nobody-has-this", "chat", streaming=True)
    tour.end()


if __name__ == "__main__":
    main()
