"""GuideLLM: a short benchmark of base and adapter, on chats and on completions; every request must succeed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import MAX_TOKENS, Tour, same

NUM_REQUESTS = 6


def benchmark(tour: Tour, model: str, route: str) -> dict:
    """Return GuideLLM's report of a few requests, two at a time. Raises RuntimeError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder, "prompts.jsonl")
        prompts.write_text("".join(json.dumps({"prompt": f"Count to {i}."}) + "\n" for i in range(NUM_REQUESTS)))
        backend = {
            "kind": "openai_http", "target": tour.url, "model": model, "request_format": route, "api_key": tour.key,
            "max_tokens": MAX_TOKENS,
        }  # fmt: skip
        scenario = Path(folder, "scenario.json")  # a command line would expose the key
        spec = {
            "backend": backend,
            "profile": {"kind": "concurrent", "streams": [2]},
            "data": [{"kind": "json_file", "path": str(prompts)}],
            "constraints": [{"kind": "max_requests", "count": NUM_REQUESTS}],
            "outputs": [{"kind": "json", "path": str(Path(folder, "report.json"))}],
        }
        scenario.write_text(json.dumps({"metadata": {"name": "tour"}, "spec": spec}))
        words = [str(Path(sys.executable).with_name("guidellm")), "run", "--config", str(scenario), "--disable-console"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "GUIDELLM__MAX_WORKER_PROCESSES": "1"}
        done = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True, timeout=200)
        if done.returncode != 0:
            raise RuntimeError(f"guidellm ended with {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
        return json.loads(Path(folder, "report.json").read_text())["benchmarks"][0]


def main() -> None:
    """Measure each model on each route."""
    tour = Tour()
    for name, model, route in (
        ("base", tour.base, "/v1/chat/completions"),
        ("adapter", tour.adapter, "/v1/chat/completions"),
        ("adapter", tour.adapter, "/v1/completions"),
    ):
        with tour.check(f"{route}, {name}"):
            report = benchmark(tour, model, route)
            totals = report["metrics"]["request_totals"]
            same((totals["successful"], totals["errored"]), (NUM_REQUESTS, 0))
            for request in report["requests"]["successful"]:
                assert 0 < request["output_metrics"]["text_tokens"] <= MAX_TOKENS, request
    with tour.check("errors: every request of an unknown model is counted as failed"):
        totals = benchmark(tour, "nobody-has-this", "/v1/chat/completions")["metrics"]["request_totals"]
        same((totals["successful"], totals["errored"]), (0, NUM_REQUESTS))
    tour.end()


if __name__ == "__main__":
    main()
