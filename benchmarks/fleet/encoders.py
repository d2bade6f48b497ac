"""Embeddings through the whole path, compared with sentence-transformers called in its own program, alternately.

    python -m benchmarks.fleet.encoders --peer-python /opt/peers/sentences/bin/python [--rounds N] [--short]

The model is a BERT of all-MiniLM-L6-v2's shape with random weights and mean pooling; texts have 16, 64 or 256 random
words. Lorafleet gets them over HTTP, 32 per request, with one request and with eight in flight. sentence-transformers
gets the same texts in one call with batches of 32, in float32 and in bfloat16. Texts per second are medians of the
rounds. The difference of two texts' vectors must agree. --short: only texts of 16 and 64 words.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from transformers import BertConfig, BertModel

from benchmarks.common import report
from benchmarks.common.fleet import Setup, fleet, scratch_folder
from benchmarks.common.random_model import random_model, save_with_tokenizer
from benchmarks.peers.sentences import NUM_SHOWN
from protocol.runtime.environment import COMPUTE, child_environment

SHAPE = BertConfig(vocab_size=49_152, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
                   intermediate_size=1536, max_position_embeddings=512)  # fmt: skip
WORDS = (16, 64, 256)
TEXTS_A_REQUEST, NUM_REQUESTS = 32, 8
LEAST_AGREEMENT = 0.9
"""Minimum cosine between both systems' differences of two texts' vectors. It is far below 1: with random weights all
texts have nearly the same vector, so that much of the difference is rounding."""

Ask = Any  # texts -> (seconds, vectors of the first texts)


def make_model(folder: Path) -> None:
    """Write the model with its tokenizer and mean pooling."""
    save_with_tokenizer(random_model(BertModel, SHAPE), folder)
    kinds = ("Transformer", "Pooling")
    paths = ("", "1_Pooling")
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": SHAPE.hidden_size, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))


def texts_of(words: int, num: int, rng: random.Random) -> list[str]:
    """Return `num` new random texts of `words` words each."""
    return [" ".join(f"{rng.choice('bcdfglmnprst')}{rng.choice('aeiou')}" for _ in range(words)) for _ in range(num)]


def over_http(url: str, concurrency: int) -> Ask:
    """Return a function that requests embeddings, with `concurrency` requests in flight."""
    client = httpx2.Client(base_url=url, timeout=300)

    def request(texts: list[str]) -> list[list[float]]:
        body = {"model": "base", "input": texts}
        found = client.post("/v1/embeddings", json=body).raise_for_status().json()["data"]
        return [item["embedding"] for item in found]

    def ask(texts: list[str]) -> tuple[float, list[list[float]]]:
        parts = [texts[i : i + TEXTS_A_REQUEST] for i in range(0, len(texts), TEXTS_A_REQUEST)]
        started_s = time.perf_counter()
        with ThreadPoolExecutor(concurrency) as pool:
            found = list(pool.map(request, parts))
        return time.perf_counter() - started_s, found[0][:NUM_SHOWN]

    return ask


@contextmanager
def peer(python: Path, model: Path, dtype: str) -> Iterator[Ask]:
    """Start sentence-transformers, and yield a function that sends it texts."""
    script = Path(__file__).parents[1] / "peers/sentences.py"
    command = [str(python), str(script), str(model), dtype]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=child_environment(*COMPUTE),
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        source, sink = process.stdout, process.stdin
        print("sentence-transformers", source.readline().strip(), dtype, flush=True)

        def ask(texts: list[str]) -> tuple[float, list[list[float]]]:
            sink.write(json.dumps(texts) + "\n")
            sink.flush()
            answer = json.loads(source.readline())
            return answer["seconds"], answer["vectors"]

        yield ask
        sink.close()


def agreement(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float:
    """Return the cosine between both systems' differences of the first two texts' vectors."""
    a, b = np.array(one[0]) - np.array(one[1]), np.array(other[0]) - np.array(other[1])
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def main() -> None:
    """Measure, print a table, and save the figures."""
    parser = report.parser(__doc__, without=("model",))
    parser.add_argument("--peer-python", type=Path, required=True, help="of an environment with sentence-transformers")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    lengths = WORDS[:2] if args.short else WORDS
    num = TEXTS_A_REQUEST * NUM_REQUESTS
    machine, rng, seconds = report.machine(), random.Random(0), dict[tuple[str, int], list[float]]()
    with scratch_folder() as scratch, ExitStack() as stack:
        model = scratch / "model"
        make_model(model)
        (scratch / "adapters").mkdir()
        running = stack.enter_context(fleet(Setup(model, scratch / "adapters", scratch)))
        systems: dict[str, Ask] = {
            "Lorafleet bf16, 8 requests at once": over_http(running.url, 8),
            "Lorafleet bf16, one by one": over_http(running.url, 1),
            "sentence-transformers bf16": stack.enter_context(peer(args.peer_python, model, "bfloat16")),
            "sentence-transformers fp32": stack.enter_context(peer(args.peer_python, model, "float32")),
        }
        for ask in systems.values():
            ask(texts_of(16, TEXTS_A_REQUEST, rng))
        for _ in range(args.rounds):
            for words in lengths:
                texts = texts_of(words, num, rng)
                vectors: list[list[list[float]]] = []
                for name, ask in systems.items():
                    took_s, shown = ask(texts)
                    seconds.setdefault((name, words), []).append(took_s)
                    vectors.append(shown)
                least = min(agreement(vectors[-1], other) for other in vectors)
                print(f"{words} words: agreement at least {least:.4f}", flush=True)
                assert least > LEAST_AGREEMENT
    rates = {key: num / statistics.median(values) for key, values in seconds.items()}
    header = ("texts a second", *(f"{words} words" for words in lengths))
    print(report.table(header, [(name, *(f"{rates[name, words]:.0f}" for words in lengths)) for name in systems]))
    points = [{"system": name, "words": words, "texts_per_s": rate} for (name, words), rate in rates.items()]
    report.save(args.out / "encoders", {"machine": machine, "rounds": args.rounds, "points": points})


if __name__ == "__main__":
    main()
