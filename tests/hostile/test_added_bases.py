"""Attacks by bases that are added while a gateway runs: missing, endless or malicious files."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx2
import pytest_asyncio
from helpers.hub_stub import Repo, run_hub
from helpers.scripted_fleet import ScriptedFleet, make_model_folder, playing, running_gateway
from helpers.waiting import wait_until

from protocol.queue.bus import Bus
from protocol.runtime import model_files
from protocol.wire import messages as m
from tests.gateway.test_added_bases import state_of
from tests.gateway.test_bases import base, chat, set_bases
from tests.lorafleet.test_fetch import python


@pytest_asyncio.fixture
async def fleet(bus: Bus, tmp_path: Path) -> AsyncIterator[ScriptedFleet]:
    async with playing(bus.url, make_model_folder(tmp_path / "of the fleet")) as scripted:
        yield scripted


def absent(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def huge_tokenizer(folder: Path) -> None:
    with (folder / "tokenizer.json").open("r+b") as file:
        file.truncate(model_files.MAX_TEXT_FILE_BYTES + 1)


def huge_config(folder: Path) -> None:
    with (folder / "config.json").open("r+b") as file:
        file.truncate(1 << 40)


def pipe(folder: Path) -> None:
    """Opening it blocks forever, waiting for a writer."""
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")


def whole_pipe(folder: Path) -> None:
    absent(folder)
    os.mkfifo(folder)


def device(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/dev/zero")


def nested(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 200_000)


def nested_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"a":' * 100_000)


def pickled(folder: Path) -> None:
    """Unpickling it would create a file."""
    code = f"cos\nsystem\n(S'touch {folder.parent}/was-run'\ntR."
    for name in ("pytorch_model.bin", "tokenizer.json", "training_args.bin"):
        (folder / name).write_text(code)


def endless_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for x in range(10**12) %}{% endfor")


def not_text(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_bytes(b"\xff\xfe\0")


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


BROKEN: list[Callable[[Path], None]] = [
    absent, huge_tokenizer, huge_config, pipe, whole_pipe, device, nested, nested_tokenizer, pickled, endless_template,
    not_text, no_tokenizer,
]  # fmt: skip


async def test_no_files_of_a_base_keep_a_gateway_from_others_or_from_starting(
    bus: Bus, fleet: ScriptedFleet, tmp_path: Path
) -> None:
    """Each fails only its own base, with a reason; later bases are read, and the next gateway starts with them."""
    (tmp_path / "models").mkdir()
    await set_bases(bus, base("a"), a=1)
    default = make_model_folder(tmp_path / "models" / "a")
    for broken in BROKEN:
        broken(make_model_folder(tmp_path / "models" / broken.__name__))
    make_model_folder(tmp_path / "models" / "sound")
    (tmp_path / "models" / "link").symlink_to(tmp_path / "models" / "sound")
    names = [broken.__name__ for broken in BROKEN]
    async with running_gateway(bus, default) as gateway, gateway.client() as http:
        for name in names:
            answer = await http.post("/v1/bases", json={"model": str(tmp_path / "models" / name)})
            assert answer.status_code == 201, answer.text
        linked = await http.post("/v1/bases", json={"model": str(tmp_path / "models" / "link")})
        assert linked.json()["id"] == "sound", "as its worker calls it"
        await all_are(http, names)
        assert (await chat(http, "a")).status_code == 200
        for name in names:
            await bus._redis.hset(bus.keys.bases, name, m.encode(base(name)))
        loads = {name: m.BaseLoad(1) for name in ("a", *names)}
        status = m.SchedulerStatus(queued=0, running=0, workers=1, drain_rate=0.0, bases=loads)
        await bus.set(bus.keys.status, status, 60_000)

        async def say_so() -> bool:
            answers = [await chat(http, name) for name in names]
            return {answer.json().get("error", {}).get("code") for answer in answers} == {"base_unreadable"}

        await wait_until(say_so, "calls of each get its reason")
    async with running_gateway(bus, default) as gateway, gateway.client() as http:
        await all_are(http, names)
        for name in (*names, "sound"):
            assert (await http.delete(f"/v1/bases/{name}")).status_code == 200
        assert (await chat(http, "a")).status_code == 200
    assert not (tmp_path / "models" / "was-run").exists()


async def all_are(http: httpx2.AsyncClient, names: list[str]) -> None:
    """Wait until all broken bases are unreadable, and the sound one is listed."""

    async def are_read() -> bool:
        listed = {one["id"]: one for one in (await http.get("/v1/bases")).json()["data"]}
        assert all(len(one["reason"] or "") < 1_000 for one in listed.values())
        wrong = [name for name in names if listed[name]["state"] != "unreadable" or not listed[name]["reason"]]
        return not wrong and listed["sound"]["state"] == "no_worker"

    await wait_until(are_read, lambda: "all are read", timeout_s=60)


async def test_what_the_hub_would_send_is_bounded_before_it_is_fetched(tmp_path: Path) -> None:
    async with run_hub() as hub:
        hub.repos["org/large"] = repo = Repo()
        repo.commit({"config.json": b"{}", "tokenizer.json": b" " * 5000})
        look = (
            "from protocol.runtime import model_files as f; f.MAX_FETCHED_BYTES = 1000; f.check_text_files('org/large')"
        )
        code, _, errors = await python(["-c", look], tmp_path, HF_ENDPOINT=hub.url)
    assert code == 1
    assert "have 5002 bytes; the limit is 1000" in errors[-1]
    fetched = await asyncio.to_thread(lambda: [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()])
    assert max(fetched, default=0) < 1000


async def test_a_storm_of_bases_leaves_the_fleet_as_it_was(bus: Bus, fleet: ScriptedFleet, tmp_path: Path) -> None:
    await set_bases(bus, base("a"), a=1)
    default = make_model_folder(tmp_path / "a")
    models = [str(make_model_folder(tmp_path / f"m{i}")) for i in range(3)]
    async with (
        running_gateway(bus, default) as one, running_gateway(bus, default) as two,
        one.client() as http, two.client() as other,
    ):  # fmt: skip

        async def storm(client: httpx2.AsyncClient, seed: int) -> set[int]:
            found: set[int] = set()
            for i in range(40):
                model = models[(i * seed) % 3]
                if (i + seed) % 2:
                    found.add((await client.post("/v1/bases", json={"model": model})).status_code)
                else:
                    found.add((await client.delete(f"/v1/bases/{Path(model).name}")).status_code)
                if i % 8 == 0:
                    assert (await chat(client, "a")).status_code == 200
            return found

        codes = await asyncio.gather(storm(http, 1), storm(other, 2), storm(http, 5), storm(other, 7))
        assert set().union(*codes) <= {200, 201, 404}
        long = await http.post("/v1/bases", content=json.dumps({"model": "/" + "x" * (1 << 16)}))
        assert 400 <= long.status_code < 500
        assert 400 <= (await http.delete("/v1/bases/" + "x" * 60_000)).status_code < 500
        for model in models:
            await http.delete(f"/v1/bases/{Path(model).name}")
        for client in (http, other):

            async def is_alone(client: httpx2.AsyncClient = client) -> bool:
                return [await state_of(client, Path(model).name) for model in models] == ["absent"] * 3

            await wait_until(is_alone, "all are gone")
            assert (await chat(client, "a")).status_code == 200
