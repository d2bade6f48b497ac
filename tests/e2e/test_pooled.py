"""A fleet on a decoder generates, embeds and labels at once, with adapters of each task, even when a worker dies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import pytest_asyncio
import torch
import torch.nn.functional as F
from helpers.factories import make_adapter, make_decoder_adapter, make_tiny_model
from helpers.fleets import one_worker_dies, services_of
from helpers.text_oracle import Oracle
from helpers.waiting import wait_until
from peft import PeftModel
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from chaos.fleet import ProcessFleet

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

TEXTS = ["The first text", "Another", "and a third, rather longer one: " + 20 * "abc ", "x"]
NUM_COPIES = 6
NUM_LABELS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory, model: Path) -> AsyncIterator[ProcessFleet]:
    folder = tmp_path_factory.mktemp("fleet")
    make_adapter(folder / "adapters" / "chat", model)
    make_decoder_adapter(folder / "adapters" / "search", AutoModel.from_pretrained(model))
    make_decoder_adapter(folder / "adapters" / "sorts", classifier(model))
    async with services_of(folder, model, "w0", "w1") as running:
        yield running


def classifier(model: Path) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(model, num_labels=NUM_LABELS)


def expected_of(model: Path, adapters: Path) -> dict[str, list[Any]]:
    """Return the results of transformers and PEFT for each of TEXTS alone: two vectors, probabilities, a text."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    texts = [tokenizer(text, return_tensors="pt") for text in TEXTS]
    plain: Any = AutoModel.from_pretrained(model)
    found: dict[str, list[Any]] = {}
    with torch.inference_mode():
        found["tiny"] = [F.normalize(plain(**ids).last_hidden_state[0, -1], dim=0).numpy() for ids in texts]
        own = PeftModel.from_pretrained(plain, str(adapters / "search")).eval()
        found["search"] = [F.normalize(own(**ids).last_hidden_state[0, -1], dim=0).numpy() for ids in texts]
        own = PeftModel.from_pretrained(classifier(model), str(adapters / "sorts")).eval()
        found["sorts"] = [own(**ids).logits[0].softmax(-1).numpy() for ids in texts]
    found["chat"] = [Oracle(model).greedy(text, 12, adapters / "chat") for text in TEXTS]
    return found


async def answers(fleet: ProcessFleet, path: str, name: str, **fields: Any) -> Any:
    async with httpx2.AsyncClient(base_url=fleet.url, timeout=60, trust_env=False) as client:
        answer = await client.post(path, json={"model": name, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def vectors(fleet: ProcessFleet, name: str, **fields: Any) -> np.ndarray:
    given = {"input": TEXTS * NUM_COPIES, "encoding_format": "float", **fields}
    data = (await answers(fleet, "/v1/embeddings", name, **given))["data"]
    return np.array([item["embedding"] for item in data], np.float32)


async def labels(fleet: ProcessFleet) -> np.ndarray:
    data = (await answers(fleet, "/v1/classify", "sorts", input=TEXTS * NUM_COPIES))["data"]
    return np.array([item["probs"] for item in data], np.float32)


async def texts(fleet: ProcessFleet) -> list[str]:
    fields = {"prompt": TEXTS, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    return [choice["text"] for choice in (await answers(fleet, "/v1/completions", "chat", **fields))["choices"]]


async def test_all_tasks_of_one_base_while_a_worker_dies(fleet: ProcessFleet, model: Path) -> None:
    expected = expected_of(model, fleet.folder / "adapters")
    assert np.abs(np.array(expected["search"]) - np.array(expected["tiny"])).max() > 0.01

    async def are_there() -> bool:
        async with httpx2.AsyncClient(base_url=fleet.url, timeout=60, trust_env=False) as client:
            return len((await client.get("/v1/models")).json()["data"]) == 4

    await wait_until(are_there, "the store has read the adapters")
    async with one_worker_dies(fleet):
        asking = asyncio.gather(vectors(fleet, "tiny"), vectors(fleet, "search"), labels(fleet), texts(fleet))
    *numbers, generated = await asking
    assert generated == expected["chat"]
    for name, got in zip(("tiny", "search", "sorts"), numbers, strict=True):
        assert np.abs(got - np.tile(np.array(expected[name]), (NUM_COPIES, 1))).max() < 1e-4, name
    shorter = await vectors(fleet, "search", dimensions=10)
    first = np.array(expected["search"])[:, :10]
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    assert np.abs(shorter - np.tile(first, (NUM_COPIES, 1))).max() < 1e-4
