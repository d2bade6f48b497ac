"""Everything that a fleet leaves on disk, passes to its processes or puts into its queue is closed to others."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Iterator
from pathlib import Path

import httpx2
import psutil
import pytest
from helpers.factories import make_adapter, make_tiny_model
from helpers.fleets import RunningFleet, completion, fleet_up
from helpers.waiting import wait_until

from protocol.queue.connection.redis_client import QueueError, connect
from protocol.queue.users import table

SECRETS = {
    "LORAFLEET_SECRET": "the-secret-of-this-fleet",
    "HF_TOKEN": "hf_aTokenThatOnlyTheStoreMaySee",
    "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "OPENAI_API_KEY": "sk-of-somebody-else-entirely",
}
MAY_SEE = {
    "gateway": {"LORAFLEET_SECRET"},
    "worker": {"LORAFLEET_SECRET"},  # the worker opens sealed bodies
    "scheduler": set[str](),
    "store": {"LORAFLEET_SECRET", "HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"},
}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFleet]:
    folder = tmp_path_factory.mktemp("fleet")
    model = make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    adapters = tmp_path_factory.mktemp("adapters")
    make_adapter(adapters / "first", model, seed=1)
    for loose in ("adapters", "logs", "queue"):  # with the permissions of an earlier version
        (folder / "data" / loose).mkdir(parents=True)
        (folder / "data" / loose).chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        with fleet_up(folder, model, "--adapters", str(adapters), "--seal-bodies") as running:
            asyncio.run(wait_until(running.is_ready, "the fleet is ready", timeout_s=100))
            yield running


async def answer(fleet: RunningFleet, name: str) -> httpx2.Response:
    async with fleet.client() as client:
        return await client.post("/v1/completions", json=completion(name, "Once upon a time"))


async def test_the_queues_file_holds_no_prompt(fleet: RunningFleet) -> None:
    """The requests are answered, so they were in the queue; test_sealing.py finds prompts there without a seal."""
    async with fleet.client() as client:
        prompt = "Once upon a time"
        found = (await client.post("/tokenize", json={"inputs": prompt, "add_special_tokens": True})).json()
        assert (await client.post("/v1/completions", json=completion("tiny", prompt))).status_code == 200
    tokens = b"".join(entry["id"].to_bytes(4, "little") for entry in found)
    files = [path.read_bytes() for path in (fleet.output_file.parent / "data").rglob("*.aof")]
    assert any(b":body:" in raw for raw in files), "the check would prove nothing"
    assert not [raw for raw in files if tokens in raw]


def services(fleet: RunningFleet) -> dict[str, psutil.Process]:
    """Return the processes started by the launcher, by service."""
    commands = {process: process.cmdline() for process in fleet.left_running()}
    return {command[-1]: process for process, command in commands.items() if command[-2:-1] == ["serve"]}


async def test_nobody_else_can_read_what_a_fleet_writes(fleet: RunningFleet) -> None:
    async def adapter_answers() -> bool:
        return (await answer(fleet, "first")).status_code == 200

    await wait_until(adapter_answers, "the adapter is mirrored and served")
    data = fleet.output_file.parent / "data"
    written = [path for path in data.rglob("*") if not path.is_symlink()]
    names = {path.name for path in written}
    assert {"appendonlydir", "queue.log", "users.acl", "password", "gateway.log", "adapter_model.safetensors"} <= names
    for path in written:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert not mode & 0o077, f"{path.relative_to(data)} has mode {mode:o}"


def test_each_process_has_the_secrets_that_it_needs(fleet: RunningFleet) -> None:
    processes = services(fleet)
    assert processes.keys() == MAY_SEE.keys()
    for service, process in processes.items():
        environment = process.environ()
        seen = {name for name, value in SECRETS.items() if value in environment.values()}
        assert seen == MAY_SEE[service], service
        for child in process.children(recursive=True):
            assert not set(SECRETS.values()) & set(child.environ().values()), child.cmdline()
            assert not [name for name in child.environ() if name.startswith("LORAFLEET_REDIS")], child.cmdline()
    assert processes["worker"].children(), "the loader is a process of its own"


def test_no_command_line_or_log_holds_a_secret(fleet: RunningFleet) -> None:
    data = fleet.output_file.parent / "data"
    passwords = [path.read_text() for path in data.glob("queue/*/users/*/password")]
    assert len(passwords) == len(table())
    hidden = [*SECRETS.values(), *passwords]
    words = [word for process in fleet.left_running() for word in process.cmdline()]
    texts = [*words, fleet.output, *(path.read_text() for path in data.rglob("*.log*"))]
    assert not [text for text in texts for secret in hidden if secret in text]


async def test_metrics_and_settings_hold_no_secret(fleet: RunningFleet) -> None:
    async with fleet.client() as client:
        for path in ("/metrics", "/info", "/openapi.json", "/v1/models"):
            text = (await client.get(path)).text
            assert not [secret for secret in SECRETS.values() if secret in text], path


async def test_the_fleets_queue_lets_nobody_in_without_a_password(fleet: RunningFleet) -> None:
    address = fleet.door("operator").redis_url
    for url in (address.replace("operator@", ""), address.replace("operator@", "operator:guess@")):
        client = connect(url, timeout_s=60)
        with pytest.raises(QueueError):
            await client.ping()
        await client.aclose()


def test_the_launcher_tells_how_to_enter_without_a_password_in_it(fleet: RunningFleet) -> None:
    assert "REDIS_URL=unix://worker@" in fleet.output
    assert "LORAFLEET_REDIS_PASSWORD_FILE=" in fleet.output
    assert (Path(fleet.output_file.parent) / "data/secret").exists() is False  # the secret was given as a variable
