"""`lorafleet up` as a user runs it: answers, adapters added later, and nothing left when it ends."""

import asyncio
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.factories import make_adapter, make_tiny_model
from helpers.fleets import RunningFleet, chunks, completion, fleet_up
from helpers.text_oracle import Oracle
from helpers.waiting import wait_until

from lorafleet.__main__ import main

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", max_len=1024)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    make_adapter(folder / "first", model, seed=1)
    return folder


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, model: Path, adapters: Path) -> Iterator[RunningFleet]:
    with fleet_up(tmp_path_factory.mktemp("fleet"), model, "--adapters", str(adapters)) as running:
        asyncio.run(wait_until(running.is_ready, "the fleet is ready", timeout_s=100))
        yield running


async def text_of(fleet: RunningFleet, model: str, **more: object) -> str:
    async with fleet.client() as client:
        response = await client.post("/v1/completions", json=completion(model, PROMPT, **more))
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


async def has_model(fleet: RunningFleet, name: str) -> bool:
    async with fleet.client() as client:
        models = (await client.get("/v1/models")).json()["data"]
    return any(model["id"] == name for model in models)


async def test_it_answers_as_transformers_and_peft_do(fleet: RunningFleet, model: Path, adapters: Path) -> None:
    async with fleet.client() as client:
        assert (await client.get("/health")).status_code == 200
    await wait_until(lambda: has_model(fleet, "first"), "the store has read the adapter")
    base, adapted = await asyncio.gather(text_of(fleet, "tiny"), text_of(fleet, "first"))
    assert base == Oracle(model).greedy(PROMPT, 12)
    assert adapted == Oracle(model).greedy(PROMPT, 12, adapters / "first")
    assert adapted != base


async def test_other_commands_find_it(fleet: RunningFleet, capfd: pytest.CaptureFixture[str]) -> None:
    assert f"console: {fleet.url}/console/" in fleet.output
    assert re.search(r"^  worker-0 +\S.*\(\d+ s\)$", fleet.output, re.MULTILINE)  # progress, without a terminal
    assert await asyncio.to_thread(main, ["status", "--json"]) == 0
    (told,) = json.loads(capfd.readouterr().out)
    assert (told["url"], told["state"], told["model"], told["workers"]) == (fleet.url, "ready", "tiny", 1)
    assert told["pid"] == fleet.process.pid
    data = f"keys list --data {told['data']}"
    for words in ("workers list", "keys list", data, "dlq list", "logs gateway", "doctor"):
        assert await asyncio.to_thread(main, words.split()) == 0, words
        assert capfd.readouterr().out, words
    assert await asyncio.to_thread(main, ["chat", "frist"]) == 2
    assert "did you mean first?" in capfd.readouterr().err


async def test_a_folder_that_appears_later_is_served(
    fleet: RunningFleet, model: Path, adapters: Path, tmp_path: Path
) -> None:
    async with fleet.client() as client:
        response = await client.post("/v1/completions", json=completion("later", PROMPT))
    assert response.status_code == 404
    make_adapter(tmp_path / "later", model, seed=2, rank=3).rename(adapters / "later")
    await wait_until(lambda: has_model(fleet, "later"), "the new adapter is listed")
    assert await text_of(fleet, "later") == Oracle(model).greedy(PROMPT, 12, adapters / "later")


async def test_ctrl_c_finishes_what_was_accepted_and_leaves_nothing(tmp_path: Path, model: Path) -> None:
    num_tokens = 300
    with fleet_up(tmp_path, model) as fleet:
        await wait_until(fleet.is_ready, "the fleet is ready", timeout_s=100)
        expected = await text_of(fleet, "tiny", max_tokens=num_tokens)
        text = ""
        async with (
            fleet.client() as client,
            client.stream(
                "POST", "/v1/completions", json=completion("tiny", PROMPT, max_tokens=num_tokens, stream=True)
            ) as response,
        ):
            async for chunk in chunks(response):
                if not text:
                    fleet.process.send_signal(signal.SIGINT)
                text += chunk
        assert text == expected
        await wait_until(fleet.has_ended, "the launcher has ended")
        assert fleet.process.returncode == 0, fleet.output
        assert fleet.is_gone()


@pytest.mark.thorough
async def test_a_second_ctrl_c_stops_at_once_even_while_starting(tmp_path: Path, model: Path) -> None:
    with fleet_up(tmp_path, model) as fleet:
        await wait_until(lambda: "scheduler  ready" in fleet.output, "services are running", timeout_s=100)
        fleet.process.send_signal(signal.SIGINT)
        await wait_until(lambda: "second signal" in fleet.output or fleet.has_ended(), "the first was heard")
        fleet.process.send_signal(signal.SIGINT)
        await wait_until(fleet.has_ended, "the launcher has ended")
        assert fleet.process.returncode == 130, fleet.output
        assert fleet.is_gone()


@pytest.mark.thorough
async def test_a_launcher_killed_by_sigkill_leaves_nothing(tmp_path: Path, model: Path) -> None:
    with fleet_up(tmp_path, model) as fleet:
        await wait_until(fleet.is_ready, "the fleet is ready", timeout_s=100)
        assert len(fleet.left_running()) >= 6  # launcher, queue, store, scheduler, gateway, worker
        assert not fleet.port_is_free()
        fleet.process.kill()
        await wait_until(fleet.is_gone, "everything is gone")


@pytest.mark.thorough
async def test_a_second_fleet_on_the_same_port_or_data_is_refused(
    fleet: RunningFleet, model: Path, tmp_path: Path
) -> None:
    with fleet_up(tmp_path / "port", model, "--port", str(fleet.port)) as second:
        await wait_until(second.has_ended, "it was refused")
        assert second.process.returncode == 2
        assert (
            second.output
            == f"lorafleet up: error: port {fleet.port} on 127.0.0.1 is in use; choose another with --port\n"
        )
    with fleet_up(tmp_path / "data", model, "--data", str(fleet.output_file.parent / "data")) as second:
        await wait_until(second.has_ended, "it was refused")
        assert second.process.returncode == 2
        assert "another fleet is using the data folder" in second.output


@pytest.mark.thorough
async def test_a_hot_swap_under_32_streams(fleet: RunningFleet, model: Path, adapters: Path) -> None:
    """No error; every answer is of one version, and of the new one after the swap; unloading then frees memory."""
    folders = [make_adapter(adapters / f"version-{i}", model, seed=20 + i) for i in (1, 2)]
    old, new = (Oracle(model).greedy(PROMPT, 12, folder) for folder in folders)
    assert old != new
    ends = asyncio.Event()
    swapped = asyncio.Event()
    answered: list[set[bool]] = [set() for _ in range(32)]  # per stream: did an answer begin after the swap?

    async with fleet.client() as client:

        async def register(source: str) -> None:
            body = {"name": "swapped", "source": source, "replace": True}
            response = await client.post("/v1/adapters", json=body)
            assert response.status_code in (200, 201), response.text

        async def keep_asking(stream: int) -> None:
            while not ends.is_set():
                begun_after = swapped.is_set()
                body = completion("swapped", PROMPT, stream=True)
                async with client.stream("POST", "/v1/completions", json=body) as response:
                    text = "".join([chunk async for chunk in chunks(response)])
                assert text == new if begun_after else text in (old, new)
                answered[stream].add(begun_after)

        await register("local:version-1")
        async with asyncio.TaskGroup() as group:
            for stream in range(32):
                group.create_task(keep_asking(stream))
            await wait_until(lambda: all(answered), "every stream has an answer")
            await register("local:version-2")
            swapped.set()
            await wait_until(lambda: all(True in begun for begun in answered), "all have the new one")
            ends.set()
        for folder in folders:
            (folder / "adapter_config.json").unlink()  # otherwise the folders' own names keep the content
        await wait_until(lambda: _is_gone(fleet, "version-2"), "the folder's own name is gone")
        gone = (await client.delete("/v1/adapters/swapped")).json()
    assert (gone["kept_by"], gone["waiting"]) == ([], [])
    assert gone["freed"]["pool_bytes"] > 0
    assert gone["freed"]["host_bytes"] > 0


async def _is_gone(fleet: RunningFleet, name: str) -> bool:
    return not await has_model(fleet, name)
