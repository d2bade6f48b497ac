"""One `lorafleet up` serves two decoders of one layout and an encoder, each with its adapters, beside a broken base."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.factories import make_adapter, make_encoder_adapter, make_tiny_encoder, make_tiny_model
from helpers.fleets import RunningFleet, completion, fleet_up
from helpers.text_oracle import Oracle
from helpers.waiting import wait_until
from peft import PeftModel
from transformers import AutoModel, AutoTokenizer

PROMPT, TEXT = "Once upon a time", "my name is ada lovelace"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the models `one`, `two`, `encoder` and `broken`, and their adapters."""
    root = tmp_path_factory.mktemp("bases")
    make_tiny_model(root / "one")
    make_tiny_model(root / "two", seed=5, max_len=256)
    make_tiny_encoder(root / "encoder")
    shutil.copytree(root / "one", root / "broken", ignore=shutil.ignore_patterns("*.safetensors"))
    adapters = root / "adapters"
    make_adapter(adapters / "pirate", root / "one", seed=1)
    make_adapter(adapters / "sailor", root / "two", seed=2)
    make_encoder_adapter(adapters / "legal", AutoModel.from_pretrained(root / "encoder"))
    _name_base(adapters / "legal", "some/other-encoder")  # not a base of this fleet, so the shapes decide
    make_adapter(adapters / "both", root / "one", seed=3)
    _name_base(adapters / "both", None)
    return root


def _name_base(adapter: Path, name: str | None) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))


@pytest.fixture(scope="module")
def fleet(folder: Path) -> Iterator[RunningFleet]:
    further = [folder / name for name in ("two", "encoder", "broken")]
    flags = ("--adapters", str(folder / "adapters"), "--no-swaps")
    with fleet_up(folder / "fleet", folder / "one", *flags, further=further) as running:

        async def is_complete() -> bool:
            if not running.is_ready():
                return False
            async with running.client() as http:
                found = (await http.get("/v1/models")).json()["data"]
            on_disk = {model["id"] for model in found if model.get("state") == "on_disk"}
            refused = {model["id"] for model in found if "fits several" in (model.get("reason") or "")}
            bases = sum(model["parent"] is None for model in found)
            is_given_up = "is given up" in running.output
            return (bases, on_disk, refused, is_given_up) == (3, {"pirate", "sailor", "legal"}, {"both"}, True)

        asyncio.run(wait_until(is_complete, "three bases are up, and one is given up", timeout_s=200, every_s=0.3))
        yield running


@cache
def generated(base: Path, adapter: Path | None) -> str:
    """Return what transformers and PEFT say to PROMPT."""
    return Oracle(base).greedy(PROMPT, 12, adapter)


async def test_every_name_is_answered_by_its_base_and_adapter(fleet: RunningFleet, folder: Path) -> None:
    adapters = folder / "adapters"
    cases = {
        "": ("one", None), "base": ("one", None), "one": ("one", None), "two": ("two", None),
        "pirate": ("one", "pirate"), "one:pirate": ("one", "pirate"), "base:pirate": ("one", "pirate"),
        "sailor": ("two", "sailor"), "two:sailor": ("two", "sailor"),
    }  # fmt: skip
    async with fleet.client() as http:
        bodies = [completion(name, PROMPT) for name in cases] * 3
        answers = await asyncio.gather(*(http.post("/v1/completions", json=body) for body in bodies))
    for body, answer in zip(bodies, answers, strict=True):
        base, adapter = cases[body["model"]]
        assert answer.status_code == 200, answer.text
        expected = generated(folder / base, adapters / adapter if adapter else None)
        assert answer.json()["choices"][0]["text"] == expected, body["model"]
    assert len({generated(folder / b, adapters / a if a else None) for b, a in cases.values()}) == 4


async def test_an_encoder_beside_decoders_embeds_with_its_own_tokenizer(fleet: RunningFleet, folder: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "encoder")
    async with fleet.client() as http:
        found = {}
        for name in ("encoder", "legal"):
            answer = await http.post("/v1/embeddings", json={"model": name, "input": TEXT})
            assert answer.status_code == 200, answer.text
            found[name] = np.array(answer.json()["data"][0]["embedding"])
        refused = await http.post("/v1/completions", json=completion("encoder", TEXT))
        tokens = (await http.post("/tokenize", json={"model": "encoder", "prompt": TEXT})).json()["tokens"]
    for name, vector in found.items():
        model: Any = AutoModel.from_pretrained(folder / "encoder")
        model = model if name == "encoder" else PeftModel.from_pretrained(model, str(folder / "adapters" / name))
        with torch.inference_mode():
            hidden = model(**tokenizer(TEXT, return_tensors="pt")).last_hidden_state[0, 0].numpy()
        np.testing.assert_allclose(vector, hidden, rtol=2e-3, atol=2e-4)
    assert np.abs(found["encoder"] - found["legal"]).max() > 0.01
    assert refused.status_code == 400
    assert "encoder is an encoder" in refused.text
    assert tokens == tokenizer(TEXT).input_ids


async def test_lists_and_status_tell_bases_apart(fleet: RunningFleet, folder: Path) -> None:
    async with fleet.client() as http:
        models = {model["id"]: model for model in (await http.get("/v1/models")).json()["data"]}
        whole = (await http.get("/v1/fleet")).json()
        answer = await http.post("/v1/completions", json=completion("sailor", PROMPT))
        explained = (await http.get(f"/v1/requests/{answer.json()['id'].removeprefix('cmpl-')}-0")).json()
        query = {"start_time": int(time.time()) // 86_400 * 86_400, "group_by": "base_model"}
        usage = (await http.get("/v1/organization/usage/completions", params=query)).json()
        longest = [(await http.get(f"/v1/models/{name}")).json()["max_model_len"] for name in ("one", "two")]
        tags = (await http.get("/api/tags")).json()["models"]
    assert list(models)[:3] == ["one", "two", "encoder"]
    parents = {name: models[name]["parent"] for name in ("one", "pirate", "sailor", "legal")}
    assert parents == {"one": None, "pirate": "one", "sailor": "two", "legal": "encoder"}
    assert longest == [512, 256]
    assert [(base["name"], base["workers"], base["task"]) for base in whole["bases"]] == [
        ("one", 1, "generate"), ("two", 1, "generate"), ("encoder", 1, "embed"), ("broken", 0, None),
    ]  # fmt: skip
    assert len({base["weights"] for base in whole["bases"]}) == 4  # one of them is None
    assert explained["base"] == "two"
    assert "two" in {row["base_model"] for day in usage["data"] for row in day["results"]}, usage
    names = {tag["name"] for tag in tags}  # Ollama's routes show only the default base
    assert names >= {"one:latest", "pirate:latest"}
    assert not names & {"two:latest", "sailor:latest", "encoder:latest", "legal:latest"}


async def test_a_registration_says_which_base_is_meant(fleet: RunningFleet, folder: Path) -> None:
    async with fleet.client() as http:
        for base in ("one", "two"):
            body = {"name": f"both-{base}", "source": "local:both", "base": base}
            made = await http.post("/v1/adapters", json=body)
            assert made.status_code == 201, made.text
            answer = await http.post("/v1/completions", json=completion(f"both-{base}", PROMPT))
            expected = generated(folder / base, folder / "adapters" / "both")
            assert answer.json()["choices"][0]["text"] == expected
        unknown = await http.post("/v1/adapters", json={"name": "x", "source": "local:both", "base": "three"})
        unfit = await http.post("/v1/adapters", json={"name": "x", "source": "local:legal", "base": "two"})
    assert unknown.status_code == 400
    assert "has no base 'three'; it has one, two, encoder, broken" in unknown.text
    assert unfit.status_code == 422
    assert "it is registered for the base two, which it does not fit" in unfit.text


async def test_models_of_one_call_are_of_one_base(fleet: RunningFleet) -> None:
    async with fleet.client() as http:
        both = await http.post("/v1/completions", json=completion("one", PROMPT) | {"models": ["one", "two"]})
        merged = {"merge_strategy": "linear", "ids": ["pirate", "sailor"], "weights": [0.5, 0.5]}
        mixed = await http.post("/generate", json={"inputs": PROMPT, "parameters": {"merged_adapters": merged}})
    assert both.status_code == 400, both.text
    assert mixed.status_code in (404, 424, 422), mixed.text
    assert "the base `two`, not of `one`" in mixed.text
