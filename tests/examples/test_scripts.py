"""The examples run as their own headers say, with a fleet whose worker has no model."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
from helpers.adapter_files import BASE, write_adapter
from helpers.scripted_fleet import make_model_folder, running_gateway
from helpers.waiting import wait_until

from adapter_store.service import serve as serve_store
from benchmarks.common.fake_worker import FakeEngine, fake_served, serve_fake
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings
from scheduler.service import serve as serve_scheduler

EXAMPLES = Path(__file__).parents[2] / "examples"
SECRET = "a secret of the tests"


@pytest_asyncio.fixture
async def url(bus: Bus, tmp_path: Path) -> AsyncIterator[str]:
    """The address of a fleet of one fake worker, with the adapter `mine` in its adapter folder."""
    model, root = make_model_folder(tmp_path / "model"), tmp_path / "adapters"
    write_adapter(root / "mine")
    stop = asyncio.Event()
    settings = Settings(
        redis_url=bus.url, data=tmp_path / "data", adapters=root, secret=SECRET, scan_interval_s=0.05, grace_s=0.0,
        worker_name="w",
    )  # fmt: skip
    served = msgspec.structs.replace(fake_served(vocab_size=300), sites=BASE.sites)
    async with asyncio.TaskGroup() as group:
        group.create_task(serve_store(settings, stop))
        group.create_task(serve_scheduler(settings, stop))
        group.create_task(serve_fake(settings, FakeEngine(step_s=0.001, vocab_size=300), served, stop))
        try:
            async with (
                running_gateway(bus, model, secret=SECRET, adapters=str(root)) as gateway,
                gateway.client() as http,
            ):

                async def is_ready() -> bool:
                    models = (await http.get("/v1/models")).json()["data"]
                    return (await http.get("/health")).status_code == 200 and len(models) == 2

                await wait_until(is_ready, "the fleet serves the adapter of its folder")
                yield gateway.url
        finally:
            stop.set()


async def run(*command: str, url: str = "") -> str:
    """Run an example, which must succeed, and return its output."""
    environment = {**os.environ, "URL": url, "KEY": ""}
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE, env=environment)
    async with asyncio.timeout(60):
        printed, errors = await process.communicate()
    assert process.returncode == 0, f"{printed.decode()}\n{errors.decode()}"
    return printed.decode()


async def test_an_adapter_is_registered_and_asked_from_python(url: str) -> None:
    script = str(EXAMPLES / "use_adapter.py")
    printed = await run(sys.executable, script, "--url", url, "again", "local:mine", "Who are you?")
    about, base, answer = printed.split("\nbase: ")[0], *printed.split("\nbase: ")[1].split("\nagain: ")
    assert about.startswith("again: rank 4, ")
    assert about.endswith("from local:mine")
    assert base.strip()
    assert answer.strip()


async def test_a_refused_adapter_ends_the_example_with_its_reason(url: str) -> None:
    script = str(EXAMPLES / "use_adapter.py")
    with pytest.raises(AssertionError, match="nowhere"):
        await run(sys.executable, script, "--url", url, "other", "local:nowhere", "Who are you?")


async def test_an_adapter_is_registered_asked_and_unloaded_with_curl(url: str) -> None:
    printed = await run(str(EXAMPLES / "use_adapter.sh"), "again", "local:mine", url=url)
    answers = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    registered, answer, listed, unloaded = answers
    assert registered["state"] in ("on_disk", "host", "resident")
    assert answer["model"] == "again"
    assert {model["id"] for model in listed["data"]} >= {"mine", "again"}
    assert unloaded["name"] == "again"


async def test_a_job_is_started_and_waited_for(url: str) -> None:
    script = str(EXAMPLES / "background_job.py")
    printed = await run(sys.executable, script, "--url", url, "mine", "Who are you?")
    assert ": completed, 200 tokens\n" in printed
    assert printed.splitlines()[-1].strip()
