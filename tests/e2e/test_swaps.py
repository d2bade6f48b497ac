"""One worker serves two decoders, an encoder and their adapters, one base after the other, beside a broken base."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
import pytest
import torch
from helpers.factories import make_adapter, make_encoder_adapter, make_tiny_encoder, make_tiny_model
from helpers.fleets import RunningFleet, completion, fleet_up
from helpers.waiting import wait_until
from peft import PeftModel
from transformers import AutoModel, AutoTokenizer

from tests.e2e.test_bases import PROMPT, TEXT, generated

DECODERS = {
    "one": ("one", None), "pirate": ("one", "pirate"), "parrot": ("one", "parrot"), "two": ("two", None),
    "sailor": ("two", "sailor"), "captain": ("two", "captain"),
}  # fmt: skip
ENCODERS = ("encoder", "legal", "medical")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the models `one`, `two`, `encoder` and `broken`, and two adapters for each but `broken`."""
    root = tmp_path_factory.mktemp("swaps")
    make_tiny_model(root / "one")
    make_tiny_model(root / "two", seed=5)
    make_tiny_encoder(root / "encoder")
    shutil.copytree(root / "one", root / "broken", ignore=shutil.ignore_patterns("*.safetensors"))
    for seed, name in enumerate(("pirate", "parrot", "sailor", "captain"), start=1):
        make_adapter(root / "adapters" / name, root / DECODERS[name][0], seed=seed)
    for seed, name in enumerate(ENCODERS[1:], start=1):
        make_encoder_adapter(root / "adapters" / name, AutoModel.from_pretrained(root / "encoder"), seed=seed)
    return root


@pytest.fixture(scope="module")
def fleet(folder: Path) -> Iterator[RunningFleet]:
    further = [folder / name for name in ("two", "encoder", "broken")]
    flags = ("--adapters", str(folder / "adapters"), "--workers", "1", "--min-residency-s", "1")
    with fleet_up(folder / "fleet", folder / "one", *flags, further=further) as running:
        asyncio.run(wait_until(lambda: _has_adapters(running, 6), "it is ready", timeout_s=200, every_s=0.3))
        yield running


async def _has_adapters(fleet: RunningFleet, num: int) -> bool:
    if not fleet.is_ready():
        return False
    async with fleet.client() as http:
        models = (await http.get("/v1/models")).json()["data"]
    return sum(model.get("state") == "on_disk" for model in models) == num


async def swaps(http: httpx2.AsyncClient) -> list[dict[str, Any]]:
    entries = (await http.get("/v1/audit", params={"limit": 1000})).json()["data"]
    return [entry for entry in entries if entry["action"] == "worker.swap"]


def embedded(folder: Path, name: str) -> np.ndarray:
    """Return the embedding of TEXT by transformers and PEFT."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "encoder")
    model: Any = AutoModel.from_pretrained(folder / "encoder")
    model = model if name == "encoder" else PeftModel.from_pretrained(model, str(folder / "adapters" / name))
    with torch.inference_mode():
        return model(**tokenizer(TEXT, return_tensors="pt")).last_hidden_state[0, 0].numpy()


async def ask(http: httpx2.AsyncClient, folder: Path, name: str) -> None:
    """Call a model and compare its answer with the expected one."""
    if name in DECODERS:
        answer = await http.post("/v1/completions", json=completion(name, PROMPT))
        assert answer.status_code == 200, answer.text
        base, adapter = DECODERS[name]
        expected = generated(folder / base, folder / "adapters" / adapter if adapter else None)
        assert answer.json()["choices"][0]["text"] == expected, name
        return
    answer = await http.post("/v1/embeddings", json={"model": name, "input": TEXT})
    assert answer.status_code == 200, answer.text
    vector = np.array(answer.json()["data"][0]["embedding"])
    np.testing.assert_allclose(vector, embedded(folder, name), rtol=2e-3, atol=2e-4)


async def test_one_worker_answers_for_every_base_and_adapter(fleet: RunningFleet, folder: Path) -> None:
    texts = [generated(folder / b, folder / "adapters" / a if a else None) for b, a in DECODERS.values()]
    assert len(set(texts)) == len(DECODERS)
    assert np.abs(embedded(folder, "legal") - embedded(folder, "medical")).max() > 0.01
    async with httpx2.AsyncClient(base_url=fleet.url, timeout=200) as http:
        before = await swaps(http)
        assert {entry["detail"].split(" why=")[0].split("to=")[1] for entry in before} >= {"two", "encoder"}
        await asyncio.gather(*(ask(http, folder, name) for name in (*DECODERS, *ENCODERS) for _ in range(2)))
        after = await swaps(http)
        assert 2 <= len(after) - len(before) <= 12, after
        assert {(entry["who"], entry["target"]) for entry in after} == {("scheduler", "worker-0")}
        whole = (await http.get("/v1/fleet")).json()
    assert [base["name"] for base in whole["bases"]] == ["one", "two", "encoder", "broken"]
    processes = [one for one in fleet.left_running() if "worker" in one.cmdline() and "serve" in one.cmdline()]
    (process,) = processes
    assert len([child for child in process.children() if child.status() != psutil.STATUS_ZOMBIE]) <= 1, "its loader"


async def test_a_base_that_never_starts_fails_its_own_calls(fleet: RunningFleet, folder: Path) -> None:
    async with httpx2.AsyncClient(base_url=fleet.url, timeout=200) as http:
        answer = await http.post("/v1/completions", json=completion("broken", PROMPT))
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "base_failed"), answer.text
        await ask(http, folder, "sailor")
