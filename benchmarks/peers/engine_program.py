"""Runs an engine without a server as a program: reads lines of JSON with requests, writes lines with times and tokens.

`benchmarks.peers.in_process` runs it in the engine's own environment, with the engine's name and its options as JSON as
arguments. `in_flight` requests are computed at a time, as if a client had them in flight: when one ends, the next one
begins. Two kinds of engines are treated better than a server could:

- OpenVINO GenAI computes one adapter at a time, so its requests are sorted by adapter in advance, and those of one
  adapter among `in_flight` form one batch.
- ONNX Runtime GenAI and ik_llama.cpp batch only requests that begin together, so all of `in_flight` begin and end
  together.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections import deque
from collections.abc import Iterator
from itertools import groupby
from typing import Any, Protocol

Request = dict[str, Any]
"""Fields: adapter (a folder, or "" for the base), prompt; when it has ended also start_s, arrivals_s, end_s and ids."""


class Engine(Protocol):
    """An engine that computes requests."""

    version: str

    def run(self, requests: list[Request], in_flight: int, num_tokens: int) -> None:
        """Compute `num_tokens` tokens for each request, greedily, and write times and tokens into it."""
        ...


class OpenVino:
    """OpenVINO GenAI's pipeline with continuous batching. Options: see `benchmarks.peers.in_process`."""

    def __init__(
        self, model: str, adapters: list[str], threads: int, max_seqs: int, precision: str, cache_gib: int
    ) -> None:
        """precision: of the arithmetic, "bf16" or "f32"; "": the engine decides by the processor."""
        self._library: Any = importlib.import_module("openvino_genai")
        self.version = importlib.import_module("importlib.metadata").version("openvino-genai")
        scheduling = self._library.SchedulerConfig()
        scheduling.cache_size = cache_gib
        scheduling.max_num_seqs = max_seqs
        scheduling.max_num_batched_tokens = 512
        scheduling.dynamic_split_fuse = True
        scheduling.enable_prefix_caching = False  # it would give an adapter the keys and values of another one
        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        if precision:
            options["INFERENCE_PRECISION_HINT"] = precision
        # The adapters of `make_adapters` have `lora_alpha / r` = 1, so no other scale is needed.
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
            gap_s = (end_s - first_s) / max(1, len(ids) - 1)  # a batch is not streamed: use the mean
            arrivals_s = [first_s + gap_s * index for index in range(len(ids))]
            request.update(start_s=start_s, arrivals_s=arrivals_s, end_s=end_s, ids=ids)


class MistralRs:
    """mistral.rs, which mixes adapters in a batch. Options: see `benchmarks.peers.in_process`."""

    def __init__(self, model: str, adapters: list[str], max_seqs: int, dtype: str) -> None:
        """dtype: of weights and arithmetic, a name of `ModelDType`."""
        self._library: Any = importlib.import_module("mistralrs")
        self.version = importlib.import_module("importlib.metadata").version("mistralrs")
        self._names = {"": None, **{folder: f"a{number}" for number, folder in enumerate(adapters)}}
        source = {"model_id": model, "dtype": getattr(self._library.ModelDType, dtype)}
        which = self._library.Which
        loaded = [self._library.LoraAdapter(name, folder) for folder, name in self._names.items() if name]
        chosen = which.Lora(**source, adapters=loaded, max_adapters=len(loaded)) if loaded else which.Plain(**source)
        self._runner = self._library.Runner(
            which=chosen,
            max_seqs=max_seqs,
            prefix_cache_n=0,
            no_paged_attn=True,
            jinja_explicit=f"{model}/plain.jinja",  # only chats are streamed: this template passes the prompt unchanged
        )

    def run(self, requests: list[Request], in_flight: int, num_tokens: int) -> None:
        """See `Engine.run`. The engine does not return token ids; the tokens' texts stand for them."""
        waiting, flying = deque(requests), deque[tuple[Request, Any]]()
        while waiting or flying:
            while waiting and len(flying) < in_flight:
                request = waiting.popleft()
                request.update(start_s=time.perf_counter(), arrivals_s=[], ids=[])
                flying.append((request, self._begun(request, num_tokens)))
            request, stream = flying.popleft()  # one thread only: others get the error "Already borrowed"
            chunk = next(stream, None)
            request["end_s"] = time.perf_counter()
            if chunk is None:
                continue
            request["ids"].append(chunk.choices[0].delta.content)
            request["arrivals_s"].append(request["end_s"])
            flying.append((request, stream))

    def _begun(self, request: Request, num_tokens: int) -> Any:
        asked = self._library.ChatCompletionRequest(
            messages=[{"role": "user", "content": request["prompt"]}],
            model="default",
            max_tokens=num_tokens,
            temperature=0.0,
            ignore_eos=True,
            stream=True,
            adapter=self._names[request["adapter"]],
        )
        return iter(self._runner.send_chat_completion_request(asked))


class Together:
    """An engine whose requests in flight all begin and end together."""

    def run(self, requests: list[Request], in_flight: int, num_tokens: int) -> None:
        """See `Engine.run`."""
        for first in range(0, len(requests), in_flight):
            batch = requests[first : first + in_flight]
            for request in batch:
                request.update(start_s=time.perf_counter(), arrivals_s=[], ids=[])
            for ids in self.tokens_of([request["prompt"] for request in batch], num_tokens):
                now_s = time.perf_counter()
                for request, id_ in zip(batch, ids, strict=True):
                    request["ids"].append(int(id_))
                    request["arrivals_s"].append(now_s)
                    request["end_s"] = now_s

    def tokens_of(self, prompts: list[str], num_tokens: int) -> Iterator[list[int]]:
        """Yield the next token of all prompts, `num_tokens` times."""
        raise NotImplementedError


class OnnxRuntime(Together):
    """ONNX Runtime GenAI without adapters. Options: see `benchmarks.peers.in_process`."""

    def __init__(self, model: str, adapters: list[str], threads: int) -> None:
        assert not adapters, "its adapters have a format of their own"
        self._library: Any = importlib.import_module("onnxruntime_genai")
        self._numpy: Any = importlib.import_module("numpy")
        self.version = importlib.import_module("importlib.metadata").version("onnxruntime-genai")
        config = self._library.Config(model)
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self._model = self._library.Model(config)
        self._tokenizer = self._library.Tokenizer(self._model)

    def tokens_of(self, prompts: list[str], num_tokens: int) -> Iterator[list[int]]:
        """See `Together.tokens_of`. Prompts are padded to the longest one: a batch needs equal lengths here."""
        ids = [list(self._tokenizer.encode(prompt)) for prompt in prompts]
        longest = max(map(len, ids))
        rows = [[*[row[0]] * (longest - len(row)), *row] for row in ids]
        length = longest + num_tokens
        parameters = self._library.GeneratorParams(self._model)
        parameters.set_search_options(
            batch_size=len(rows), max_length=length, min_length=length, do_sample=False
        )  # min_length prevents an end of text
        generator = self._library.Generator(self._model, parameters)
        generator.append_tokens(self._numpy.array(rows, dtype=self._numpy.int32))
        for _ in range(num_tokens):
            generator.generate_next_token()
            yield list(generator.get_next_tokens())


class IkLlama(Together):
    """ik_llama.cpp without adapters. Options: see `benchmarks.peers.in_process`."""

    def __init__(self, model: str, adapters: list[str], threads: int, max_seqs: int, slot_tokens: int) -> None:
        """slot_tokens: space for a prompt and its answer."""
        assert not adapters, "it changes them for all sequences at once"
        self._numpy: Any = importlib.import_module("numpy")
        parts: Any = importlib.import_module("ik_llama_cpp._internals")
        self._library: Any = importlib.import_module("ik_llama_cpp._ctypes_api")
        self.version = importlib.import_module("importlib.metadata").version("ik-llama-cpp-python")
        self._model = parts.IkModel(model)
        sizes = {"n_ctx": max_seqs * slot_tokens, "n_seq_max": max_seqs, "n_threads": threads}
        self._context = parts.IkContext(self._model, **sizes, flash_attn=False)  # aborts with several sequences if on

    def tokens_of(self, prompts: list[str], num_tokens: int) -> Iterator[list[int]]:
        """See `Together.tokens_of`. An end of text counts as any other token."""
        self._context.kv_cache_clear()
        rows = [self._model.tokenize(prompt, add_bos=False) for prompt in prompts]
        lengths = [len(row) for row in rows]
        ids = [self._decoded([row], [0], [number])[0] for number, row in enumerate(rows)]
        for index in range(num_tokens):
            yield ids
            if index < num_tokens - 1:
                places = [length + index for length in lengths]
                ids = self._decoded([[id_] for id_ in ids], places, list(range(len(ids))))

    def _decoded(self, rows: list[list[int]], places: list[int], sequences: list[int]) -> list[int]:
        """Compute tokens of sequences, each row from its position on. Return the most probable next token of each."""
        library, total = self._library, sum(map(len, rows))
        batch = library.llama_batch_init(total, 0, 1)
        batch.n_tokens = total
        index, lasts = 0, list[int]()
        for row, place, sequence in zip(rows, places, sequences, strict=True):
            for offset, id_ in enumerate(row):
                batch.token[index], batch.pos[index] = id_, place + offset
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
                batch.logits[index] = offset == len(row) - 1
                index += 1
            lasts.append(index - 1)
        status = self._context.decode(batch)
        library.llama_batch_free(batch)
        assert status == 0, f"llama_decode: {status}"
        shape = (self._model.n_vocab,)
        found = (self._numpy.ctypeslib.as_array(self._context.get_logits(last), shape) for last in lasts)
        return [int(logits.argmax()) for logits in found]


ENGINES: dict[str, Any] = {
    "openvino": OpenVino,
    "mistralrs": MistralRs,
    "onnxruntime": OnnxRuntime,
    "ik_llama": IkLlama,
}


def main() -> None:
    """Answer input lines until the input ends."""
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
