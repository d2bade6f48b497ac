"""A base is added to a real fleet whose queue has passwords, answers as PEFT does, and is removed during a stream."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path

import httpx2
import pytest
from helpers.factories import make_adapter, make_tiny_model
from helpers.fleets import completion, fleet_up
from helpers.waiting import wait_until

from lorafleet.__main__ import main
from tests.e2e.test_bases import PROMPT, generated

ADAPTERS = {"pirate": "one", "sailor": "two"}


async def says(http: httpx2.AsyncClient, model: str) -> str:
    answer = await http.post("/v1/completions", json=completion(model, PROMPT))
    return answer.json()["choices"][0]["text"] if answer.is_success else f"{answer.status_code}"


@pytest.mark.thorough
async def test_a_base_is_added_asked_and_taken_away_while_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("one", 0), ("two", 5)):
        make_tiny_model(tmp_path / name, seed=seed, max_len=512)
    for seed, (name, base) in enumerate(ADAPTERS.items()):
        make_adapter(tmp_path / "adapters" / name, tmp_path / base, seed=seed)

    async def lorafleet(*words: str, code: int = 0) -> str:
        capsys.readouterr()
        assert await asyncio.to_thread(main, words) == code
        told = capsys.readouterr()
        return told.out + told.err

    flags = ("--adapters", str(tmp_path / "adapters"))
    with fleet_up(tmp_path / "fleet", tmp_path / "one", *flags) as fleet:
        await wait_until(fleet.is_ready, "the fleet is up", timeout_s=100)
        monkeypatch.setenv("LORAFLEET_URL", fleet.url)
        async with fleet.client() as http:

            async def is_as_peft(model: str) -> bool:
                adapter = tmp_path / "adapters" / model if model in ADAPTERS else None
                return await says(http, model) == generated(tmp_path / ADAPTERS.get(model, model), adapter)

            await wait_until(partial(is_as_peft, "pirate"), "the adapter is there", timeout_s=60, every_s=0.3)
            assert "two was added" in await lorafleet("bases", "add", str(tmp_path / "two"))
            assert await is_as_peft("pirate"), "nobody notices"
            fleet.add_worker(tmp_path / "two", "second", tmp_path)
            for model in ("two", "sailor", "pirate", "one"):
                await wait_until(partial(is_as_peft, model), f"{model} answers", timeout_s=100, every_s=0.3)
            assert generated(tmp_path / "two", None) != generated(tmp_path / "one", None)
            assert await says(http, "two:pirate") == "404"
            listed = await lorafleet("bases", "list")
            assert [line.split()[:2] for line in listed.splitlines()[1:]] == [["one", "ready"], ["two", "ready"]]
            body = completion("sailor", PROMPT) | {"max_tokens": 300, "stream": True}
            ends: list[str] = []
            async with http.stream("POST", "/v1/completions", json=body) as stream:
                lines = stream.aiter_lines()
                assert await anext(lines)
                assert "no longer served" in await lorafleet("bases", "remove", "two")
                async for line in lines:
                    if line.startswith("data: {"):
                        ends += [choice["finish_reason"] for choice in json.loads(line[6:])["choices"]]
            assert [end for end in ends if end] == ["length"], "what runs is finished"

            async def is_gone() -> bool:
                return await says(http, "two") == "404" and await says(http, "sailor") in ("404", "503")

            await wait_until(is_gone, "its calls are refused", every_s=0.2)

            async def is_drained() -> bool:
                return "draining" in await lorafleet("workers", "list")

            await wait_until(is_drained, "its worker drains", every_s=0.2)
            assert await is_as_peft("pirate")
            assert await is_as_peft("one")
            fleet.more[0].terminate()
            await asyncio.to_thread(fleet.more[0].wait)

            async def is_alone() -> bool:
                return "bases" not in (await http.get("/v1/fleet")).json()

            await wait_until(is_alone, "one base is left", every_s=0.2)
            assert await is_as_peft("pirate")
            told = await lorafleet("bases", "remove", "one", code=2)
            assert "the base one is in the settings of this fleet" in told


@pytest.mark.thorough
async def test_the_only_worker_becomes_a_base_that_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seed in (("one", 0), ("two", 5)):
        make_tiny_model(tmp_path / name, seed=seed, max_len=512)
    with fleet_up(tmp_path / "fleet", tmp_path / "one", "--min-residency-s", "0.5", "--max-swap-wait-s", "5") as fleet:
        await wait_until(fleet.is_ready, "the fleet is up", timeout_s=100)
        monkeypatch.setenv("LORAFLEET_URL", fleet.url)
        async with fleet.client() as http:

            async def is_its_own(model: str) -> bool:
                return await says(http, model) == generated(tmp_path / model, None)

            assert await is_its_own("one")
            assert await asyncio.to_thread(main, ["bases", "add", str(tmp_path / "two")]) == 0
            await wait_until(partial(is_its_own, "two"), "two answers", timeout_s=100, every_s=0.3)
            for model in ("one", "two", "one"):  # once the base is known, calls wait for the swap
                assert await is_its_own(model)
            assert await asyncio.to_thread(main, ["bases", "remove", "two"]) == 0

            async def is_gone() -> bool:
                return await says(http, "two") == "404"

            await wait_until(is_gone, "its calls are refused", every_s=0.2)
            assert await is_its_own("one")
