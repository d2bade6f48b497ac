"""Workers join, leave and are killed while clients wait for their answers."""

import asyncio
import re
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from helpers.factories import make_adapter, make_tiny_model
from helpers.fleets import RunningFleet, chunks, completion, fleet_up
from helpers.processes import is_running, working_below
from helpers.waiting import wait_until

from protocol.queue.bus import Bus, decode
from protocol.wire.messages import Assigned, WorkerBeat

NUM_TOKENS = 800
PROMPTS = ("Once upon a time", "The king said", "In the forest", "A ship sailed")
MODELS = ("tiny", "pirate")
FORMS = {"In the forest": r"([a-e]{6}-[0-9]{3} ){30,90}"}
"""Prompt -> regular expression that answers must match."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", max_len=1024)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[RunningFleet]:
    folder = tmp_path_factory.mktemp("fleet")
    make_adapter(folder / "adapters" / "pirate", model)
    with fleet_up(folder, model, "--adapters", str(folder / "adapters")) as running:
        asyncio.run(wait_until(running.is_ready, "the fleet is ready", timeout_s=100))
        yield running


@pytest_asyncio.fixture
async def queue(fleet: RunningFleet) -> AsyncIterator[Bus]:
    bus = Bus(fleet.door("worker").queue_url())  # who sees requests and work
    yield bus
    await bus.close()


async def live_workers(queue: Bus) -> dict[str, WorkerBeat]:
    """Return the last heartbeats of workers that accept requests, by name."""
    beats = (await queue.members.worker_beats()).values()
    return {beat.name: beat for beat in beats if beat is not None and not beat.draining}


async def ask_all(fleet: RunningFleet, texts: dict[tuple[str, str], str]) -> None:
    """Stream an answer to every prompt from every model at once, and collect the texts in `texts`."""

    async def ask(model: str, prompt: str) -> None:
        body = completion(model, prompt, max_tokens=NUM_TOKENS, stream=True)
        if prompt in FORMS:
            body["structured_outputs"] = {"regex": FORMS[prompt]}
        async with fleet.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
            async for chunk in chunks(response):
                texts[model, prompt] = texts.get((model, prompt), "") + chunk

    await asyncio.gather(*(ask(model, prompt) for model in MODELS for prompt in PROMPTS))


async def test_clients_get_their_whole_text_whatever_happens_to_workers(
    fleet: RunningFleet, queue: Bus, model: Path, tmp_path: Path
) -> None:
    expected: dict[tuple[str, str], str] = {}
    await ask_all(fleet, expected)
    assert len(set(expected.values())) == len(MODELS) * len(PROMPTS)
    for (_, prompt), text in expected.items():
        assert prompt not in FORMS or re.fullmatch(r"([a-e]{6}-[0-9]{3} )+.{0,10}", text), text

    # A second worker joins the running fleet.
    fleet.add_worker(model, "joined", tmp_path)
    await wait_until(lambda: joined(queue, 2), "two workers take requests", timeout_s=100)

    # One is killed while it runs requests that have produced some tokens: the other resumes them, and the launcher
    # restarts the first.
    texts: dict[tuple[str, str], str] = {}
    asking = await ask_until_it_works(fleet, queue, "worker-0", texts)
    fleet.worker("worker-0").send_signal(signal.SIGKILL)
    assert not asking.done()
    await asking
    assert texts == expected
    await wait_until(lambda: joined(queue, 2), "worker-0 takes requests again", timeout_s=100)
    assert "worker-0 was killed by SIGKILL; restarting it" in fleet.output

    # One leaves while it works: it hands its requests over.
    asking = await ask_until_it_works(fleet, queue, "joined", texts)
    leaver = fleet.worker("joined")
    leaver.send_signal(signal.SIGTERM)
    await wait_until(lambda: not is_running(leaver.pid), "it has left")
    await asking
    assert texts == expected


async def ask_until_it_works(
    fleet: RunningFleet, queue: Bus, worker: str, texts: dict[tuple[str, str], str]
) -> asyncio.Task[None]:
    """Return the running task of `ask_all` at a moment when a worker is in the middle of one of its requests.

    A round that ends before that is repeated: on a busy machine the requests may end between two looks, and the
    scheduler may give all of a round to the other worker.
    """
    for _ in range(20):
        texts.clear()
        asking = asyncio.create_task(ask_all(fleet, texts))
        while not asking.done():
            if await holds_some(queue, worker):
                return asking
            await asyncio.sleep(0.01)
        await asking
    raise AssertionError(f"{worker} was never seen in the middle of a request")


async def test_the_launcher_replaces_a_killed_queue(fleet: RunningFleet) -> None:
    (server,) = working_below(fleet.output_file.parent / "data")
    server.send_signal(signal.SIGKILL)
    await wait_until(lambda: "queue ended" in fleet.output, "the launcher has noticed")
    texts: dict[tuple[str, str], str] = {}
    await wait_until(lambda: is_healthy(fleet), "the fleet is ready again", timeout_s=100)
    await ask_all(fleet, texts)
    assert len(texts) == len(MODELS) * len(PROMPTS)


async def is_healthy(fleet: RunningFleet) -> bool:
    async with fleet.client() as client:
        return (await client.get("/health")).status_code == 200


async def joined(queue: Bus, num_workers: int) -> bool:
    return len(await live_workers(queue)) == num_workers


async def holds_some(queue: Bus, name: str) -> bool:
    """Return whether a worker runs a request of which some tokens, but fewer than half, are there."""
    beat = (await live_workers(queue))[name]
    for _, fields in await queue.streams.entries(queue.keys.work(beat.wid)):
        for item in decode(fields[b"b"], list[Assigned]):
            (facts,) = await queue.requests([item.rid])
            if facts is not None and 0 < facts.num_output_tokens < NUM_TOKENS // 2:
                return True
    return False
