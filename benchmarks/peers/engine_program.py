"""An engine that has no server, as a program: a line of JSON with requests in, a line with their times and tokens out.

Run by `benchmarks.peers.in_process` in the engine's own environment, with the engine's name and its options as JSON as
arguments. `in_flight` requests are computed at a time, as a client of a server has them in flight: as soon as one ends,
the next one begins. OpenVINO GenAI computes one adapter at a time, so its requests are sorted by adapter beforehand,
which no server could do, and those of one adapter among `in_flight` are one batch.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections import deque
from itertools import groupby
from typing import Any, Protocol

Request = dict[str, Any]
"""adapter (a folder, or "" for the base), prompt; and when it is done start_s, arrivals_s, end_s and ids."""


class Engine(Protocol):
    """What computes requests."""

    version: str

    def run(self, requests: list[Request], in_flight: int, num_tokens: int) -> None:
        """Compute `num_tokens` tokens for each request, greedily, and write times and tokens into it."""
        ...


class OpenVino:
    """OpenVINO GenAI's pipeline with continuous batching. Options: see `benchmarks.peers.in_process`."""

    def __init__(
        self, model: str, adapters: list[str], threads: int, max_seqs: int, precision: str, cache_gib: int
    ) -> None:
        """precision: of the arithmetic, "bf16" or "f32"; by default the processor decides."""
        self._library: Any = importlib.import_module("openvino_genai")
        self.version = importlib.import_module("importlib.metadata").version("openvino-genai")
        scheduling = self._library.SchedulerConfig()
        scheduling.cache_size = cache_gib
        scheduling.max_num_seqs = max_seqs
        scheduling.max_num_batched_tokens = 512
        scheduling.dynamic_split_fuse = True
        scheduling.enable_prefix_caching = False  # it gives an adapter the keys and values of another one
        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        if precision:
            options["INFERENCE_PRECISION_HINT"] = precision
        # The scale is all of `lora_alpha / r`, which is 1 for the adapters of `make_adapters`.
        self._adapters = {folder: self._library.Adapter(f"{folder}/adapter_model.safetensors") for folder in adapters}
        if adapters:
            kind = self._library.AdapterConfig
            options["adapters"] = kind(list(self._adapters.values()), kind.Mode.MODE_DYNAMIC)
        self._pipeline = self._library.ContinuousBatchingPipeline(model, scheduling, "CPU", options)
        self._next_id = 0

    def run(self, requests: list[Request], in_flight: int, num_tokens: int) -> None:
        """See `Engine.run`."""
        if not self._adapters:
            self._run_all(requests, in_flight, self._config("", num_tokens))
            return
        ordered = sorted(requests, key=lambda request: request["adapter"])
        for first in range(0, len(ordered), in_flight):
            batch = ordered[first : first + in_flight]
            start_s = time.perf_counter()
            for adapter, group in groupby(batch, key=lambda request: request["adapter"]):
                self._run_group(list(group), self._config(adapter, num_tokens), start_s)

    def _config(self, adapter: str, num_tokens: int) -> Any:
        config = self._library.GenerationConfig()
        config.max_new_tokens = num_tokens
        config.ignore_eos = True
        config.do_sample = False
        config.apply_chat_template = False
        if self._adapters:
            kind = self._library.AdapterConfig
            config.adapters = kind(self._adapters[adapter], 1.0) if adapter else kind()
        return config

    def _run_all(self, requests: list[Request], in_flight: int, config: Any) -> None:
        waiting, flying = deque(requests), list[tuple[Request, Any]]()
        while waiting or flying:
            while waiting and len(flying) < in_flight:
                request = waiting.popleft()
                request.update(start_s=time.perf_counter(), arrivals_s=[], ids=[])
                self._next_id += 1
                flying.append((request, self._pipeline.add_request(self._next_id, request["prompt"], config)))
            self._pipeline.step()
            now_s = time.perf_counter()
            for request, handle in flying:
                while handle.can_read():
                    for output in handle.read().values():
                        request["ids"] += output.generated_ids
                        request["arrivals_s"].append(now_s)
                request["end_s"] = now_s
            flying = [(request, handle) for request, handle in flying if len(request["ids"]) < config.max_new_tokens]

    def _run_group(self, requests: list[Request], config: Any, start_s: float) -> None:
        begun_s = time.perf_counter()
        encoder = self._pipeline.get_tokenizer()
        prompts = [encoder.encode(request["prompt"]).input_ids for request in requests]
        results = self._pipeline.generate(prompts, [config] * len(requests))
        end_s = time.perf_counter()
        for request, result in zip(requests, results, strict=True):
            ids = list(result.m_generation_ids[0])
            first_s = begun_s + result.perf_metrics.get_ttft().mean / 1e3
            gap_s = (end_s - first_s) / max(1, len(ids) - 1)  # a batch is not streamed: the mean
            arrivals_s = [first_s + gap_s * index for index in range(len(ids))]
            request.update(start_s=start_s, arrivals_s=arrivals_s, end_s=end_s, ids=ids)


ENGINES: dict[str, Any] = {"openvino": OpenVino}


def main() -> None:
    """Answer lines until there are none."""
    name, options = sys.argv[1:]
    engine: Engine = ENGINES[name](**json.loads(options))
    print(json.dumps({"version": engine.version}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        begun_s = time.process_time()
        engine.run(asked["requests"], asked["in_flight"], asked["num_tokens"])
        print(json.dumps({"processor_s": time.process_time() - begun_s, "requests": asked["requests"]}), flush=True)


if __name__ == "__main__":
    main()
