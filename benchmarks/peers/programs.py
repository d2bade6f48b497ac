"""Engines without a server, run as programs and driven through a pipe: see `engine_program.py`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.peers.servers import Server
from lorafleet.bench import BenchConfig, BenchRequest, BenchResult
from lorafleet.bench.workload import PlannedRequest, plan_requests
from protocol.runtime.environment import child_environment


class Program:
    """A running engine, and the adapter folder of each target name."""

    def __init__(self, process: subprocess.Popen[str], adapters: dict[str, str]) -> None:
        self._process = process
        self._adapters = adapters
        self.version: str = self._read()["version"]

    def bench(self, config: BenchConfig) -> tuple[BenchResult, float]:
        """Run a load as `run_bench` does, as a closed loop, without HTTP. Return values: see `run.Ask`."""
        started_at = datetime.now(UTC).isoformat(timespec="seconds")
        records, processor_s = self._ask(list(plan_requests(config)), config)
        wall_s = max(record.end_s for record in records) - min(record.start_s for record in records)
        return BenchResult({}, started_at, wall_s, 0.0, records), processor_s

    def answers(self, prompt: str, num_tokens: int) -> dict[str, str]:
        """Return the answers of the base and of the first three adapters to a prompt, computed one after the other."""
        asked = ["", *self._adapters.values()][:4]
        requests = [{"adapter": adapter, "prompt": prompt} for adapter in asked]
        done = self._exchange({"requests": requests, "in_flight": 1, "num_tokens": num_tokens})["requests"]
        return {request["adapter"]: str(request["ids"]) for request in done}

    def _ask(self, planned: list[PlannedRequest], config: BenchConfig) -> tuple[list[BenchRequest], float]:
        names = {self._adapters.get(request.target.name, ""): request.target.name for request in planned}
        requests = [
            {"adapter": self._adapters.get(request.target.name, ""), "prompt": request.body["prompt"]}
            for request in planned
        ]
        answer = self._exchange(
            {"requests": requests, "in_flight": config.concurrency, "num_tokens": config.output_tokens}
        )
        done = answer["requests"]
        short = [len(request["ids"]) for request in done if len(request["ids"]) != config.output_tokens]
        if short:
            raise RuntimeError(f"requests for {config.output_tokens} tokens ended with {short}")
        records = [
            BenchRequest(
                names[request["adapter"]],
                start_s=request["start_s"],
                end_s=request["end_s"],
                arrivals_s=request["arrivals_s"],
                output_tokens=len(request["ids"]),
                complete=True,
            )
            for request in done
        ]
        return records, answer["processor_s"]

    def _exchange(self, line: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        """Return the next line of JSON; skip lines that libraries print."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(('{"version"', '{"processor_s"')):
                return json.loads(line)
        raise RuntimeError(f"{self._process.args} ended with {self._process.wait()}")


@contextmanager
def program(server: Server, log_path: Path) -> Iterator[Program]:
    """Run the program of a `Server` with `adapters`, and end it after the block."""
    assert server.adapters is not None
    environment = child_environment() | server.environment
    with (
        log_path.open("w") as log,
        subprocess.Popen(
            server.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        ) as process,
    ):
        try:
            yield Program(process, server.adapters)
        finally:
            process.kill()
