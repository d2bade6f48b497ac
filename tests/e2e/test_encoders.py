"""Fleets on encoders serve embeddings, entities, ranks and labels of base and adapters, even when a worker dies."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import pytest_asyncio
import torch
from helpers.factories import LABELS, WORDS, make_encoder_adapter, make_tiny_encoder
from helpers.fleets import one_worker_dies, services_of
from helpers.scripted_fleet import running_gateway
from helpers.waiting import wait_until
from peft import PeftModel
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

import adapter_store.service
import gpu_worker.service.program
import scheduler.service
from chaos.fleet import ProcessFleet
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings

TEXTS = [" ".join(WORDS.split()[i : i + 3 + i % 4]) for i in range(12)]
NUM_COPIES = 8
"""Copies of each text in a call, so that every worker gets some."""


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_encoder(tmp_path_factory.mktemp("embedder") / "tiny")


@pytest_asyncio.fixture
async def fleet(tmp_path: Path, embedder: Path) -> AsyncIterator[ProcessFleet]:
    make_encoder_adapter(tmp_path / "adapters" / "legal", AutoModel.from_pretrained(embedder))
    async with services_of(tmp_path, embedder, "w0", "w1") as running:
        yield running


def embeddings_of(folder: Path, adapter: Path | None = None) -> np.ndarray:
    """Return transformers' and PEFT's embedding of each of TEXTS alone: the first token's hidden state, as in LoRAX."""
    model = AutoModel.from_pretrained(folder)
    model = model if adapter is None else PeftModel.from_pretrained(model, str(adapter))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        found = [model.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 0] for text in TEXTS]
    return torch.stack(found).numpy()


async def ask(fleet: ProcessFleet, model: str) -> np.ndarray:
    body = {"model": model, "input": TEXTS * NUM_COPIES, "encoding_format": "float"}
    async with httpx2.AsyncClient(base_url=fleet.url, timeout=60, trust_env=False) as client:
        answer = await client.post("/v1/embeddings", json=body)
    assert answer.status_code == 200, answer.text
    return np.array([item["embedding"] for item in answer.json()["data"]], np.float32)


async def test_embeddings_are_transformers_and_peft_s_while_a_worker_dies(fleet: ProcessFleet, embedder: Path) -> None:
    adapter = fleet.folder / "adapters" / "legal"
    expected = {"tiny": embeddings_of(embedder), "legal": embeddings_of(embedder, adapter)}
    assert np.abs(expected["legal"] - expected["tiny"]).max() > 0.01

    async def is_there() -> bool:
        async with httpx2.AsyncClient(base_url=fleet.url, timeout=60, trust_env=False) as client:
            return len((await client.get("/v1/models")).json()["data"]) == 2

    await wait_until(is_there, "the store has read the adapter")
    async with one_worker_dies(fleet):
        asking = asyncio.gather(ask(fleet, "tiny"), ask(fleet, "legal"))
    for name, got in zip(expected, await asking, strict=True):
        assert np.abs(got - np.tile(expected[name], (NUM_COPIES, 1))).max() < 1e-4, name


@asynccontextmanager
async def all_services(bus: Bus, model: Path, folder: Path, adapters: Path) -> AsyncIterator[str]:
    """Run a fleet's services in this process, which starts faster. Yield the gateway's address."""
    stop = asyncio.Event()
    settings = Settings(
        redis_url=bus.url, model=str(model), data=folder, adapters=adapters, port=0, device="cpu", dtype="float32",
        kernels="reference", threads=1, grace_s=1.0,
    )  # fmt: skip
    services = (adapter_store.service, scheduler.service, gpu_worker.service.program)
    async with asyncio.TaskGroup() as group:
        for service in services:
            group.create_task(service.serve(settings, stop))
        try:
            async with running_gateway(bus, model, data=folder) as running:
                yield running.url
        finally:
            stop.set()


async def test_entities_of_a_fleet_on_a_token_classifier(bus: Bus, tmp_path: Path) -> None:
    folder = make_tiny_encoder(tmp_path / "tagger", labels=LABELS)
    adapter = make_encoder_adapter(
        tmp_path / "adapters" / "mine", AutoModelForTokenClassification.from_pretrained(folder)
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForTokenClassification.from_pretrained(folder)

    def probabilities(model: torch.nn.Module) -> torch.Tensor:
        with torch.inference_mode():
            return model.eval()(**tokenizer(WORDS, return_tensors="pt")).logits[0, 1:-1].softmax(-1)

    expected = {"": probabilities(model), "mine": probabilities(PeftModel.from_pretrained(model, str(adapter)))}
    async with (
        all_services(bus, folder, tmp_path / "data", tmp_path / "adapters") as url,
        httpx2.AsyncClient(base_url=url, timeout=60) as client,
    ):
        instead = ""

        async def ask(name: str) -> list[dict[str, object]] | None:
            nonlocal instead
            answer = await client.post("/classify", json={"inputs": WORDS, "parameters": {"adapter_id": name}})
            instead = f"{name or 'the base'} is served, not {answer.status_code} {answer.text}"
            return answer.json() if answer.status_code == 200 else None

        found = {
            name: await wait_until(lambda name=name: ask(name), lambda: instead, timeout_s=90) for name in expected
        }
    for name, scores in expected.items():
        kinds = [LABELS[label].rpartition("-")[2] for label in scores.argmax(-1)]
        told = {part for entity in found[name] for part in str(entity["word"]).split()}
        wanted = {word for word, kind in zip(WORDS.split(), kinds, strict=True) if kind != "O"}
        assert told == wanted, name
        assert found[name], name
    assert found[""] != found["mine"]


async def test_ranks_and_labels_of_a_fleet_on_a_cross_encoder(bus: Bus, tmp_path: Path) -> None:
    folder = make_tiny_encoder(tmp_path / "ranker", labels=["relevance"], of_texts=True)
    kind, adapters = AutoModelForSequenceClassification, tmp_path / "adapters"
    make_encoder_adapter(adapters / "mine", kind.from_pretrained(folder))
    make_encoder_adapter(adapters / "moods", kind.from_pretrained(folder, num_labels=3, ignore_mismatched_sizes=True))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    query, documents = TEXTS[0], TEXTS[1:7]

    def logits(name: str, num_labels: int = 1) -> torch.Tensor:
        model = kind.from_pretrained(folder, num_labels=num_labels, ignore_mismatched_sizes=True)
        model = PeftModel.from_pretrained(model, str(adapters / name)).eval() if name else model.eval()
        pairs = [(query, document) for document in documents] if num_labels == 1 else [(text,) for text in documents]
        with torch.inference_mode():
            return torch.cat([model(**tokenizer(*pair, return_tensors="pt")).logits for pair in pairs])

    async with (
        all_services(bus, folder, tmp_path / "data", adapters) as url,
        httpx2.AsyncClient(base_url=url, timeout=60) as client,
    ):
        instead = ""

        async def ask(path: str, **body: object) -> dict[str, Any] | None:
            nonlocal instead
            answer = await client.post(path, json=body)
            instead = f"{body['model']} is served, not {answer.status_code} {answer.text}"
            return answer.json() if answer.status_code == 200 else None

        async def served(path: str, **body: object) -> dict[str, Any]:
            return await wait_until(lambda: ask(path, **body), lambda: instead, timeout_s=90)

        found: dict[str, np.ndarray] = {}
        for name in ("", "mine"):
            answer = await served("/v1/rerank", model=name or "base", query=query, documents=documents)
            expected = logits(name).sigmoid()[:, 0].numpy()
            order = [row["index"] for row in answer["results"]]
            found[name] = np.array([row["relevance_score"] for row in answer["results"]])
            assert order == np.argsort(-expected).tolist()
            assert np.abs(found[name] - expected[order]).max() < 1e-5
        assert np.abs(found[""] - found["mine"]).max() > 0.01
        answer = await served("/v1/classify", model="moods", input=documents)
        probs = np.array([row["probs"] for row in answer["data"]])
        assert np.abs(probs - logits("moods", 3).softmax(-1).numpy()).max() < 1e-5
        assert np.ptp(probs, axis=0).max() > 0.01
