"""A worker on another host whose cable is unplugged, so that packets are lost without an error on either side.

And a worker that the kernel kills because it uses too much memory.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from helpers.factories import make_adapter, make_tiny_model
from helpers.hosts import MEMORY, Host, MemoryGroup, memory_group, relay, two_hosts
from helpers.preloaded import fork
from helpers.waiting import wait_until

from chaos.clients.asks import GREEDY, Ask
from chaos.clients.client import Call, Client
from chaos.fleet import ProcessFleet, Shape
from lorafleet.launcher.embedded import EmbeddedServer

NUM_TOKENS = 5000  # a worker makes 1000 a second, and reports its requests once a second
PORT = 7001

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]


@pytest.fixture
def memory() -> Iterator[MemoryGroup | None]:
    """Create a group that limits the memory of the worker `near`, and remove it at the end; None if unsupported."""
    if not os.access(MEMORY, os.W_OK):
        yield None
        return
    with memory_group(f"lorafleet-{os.getpid()}") as group:
        yield group


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def started(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Host, ProcessFleet]]:
    """A fleet on the host `near`, whose worker `far` runs on another host and reaches the queue through a cable."""
    folder: Path = tmp_path_factory.mktemp("fleet")
    model = make_tiny_model(folder / "model", max_len=12_000)
    make_adapter(folder / "adapters" / "one", model, seed=1)
    with two_hosts() as (near, far):
        running = ProcessFleet.prepare(
            folder,
            model,
            folder / "adapters",
            durable=False,
            spawn=fork,
            request_timeout_s=200,
            secret="the fleet of this test",
        )
        assert isinstance(running.queue, EmbeddedServer)
        with relay(near, PORT, running.queue.socket) as queue:
            running.add("store", store_host=near.address).within = near.within
            running.add("worker", "far", redis_url=f"redis://{queue}").within = far.within
            try:
                await running.start_all(Shape(workers=("far",)))
                yield near, running
            finally:
                await running.close()


@pytest_asyncio.fixture(loop_scope="module")
async def hosts_and_fleet(started: tuple[Host, ProcessFleet]) -> tuple[Host, ProcessFleet]:
    """The fleet with its cable, and `far` as its only worker, restored after earlier tests."""
    near, fleet = started
    near.run("ip link set cable1 up")
    if not fleet.members["far"].is_running:
        fleet.start("worker", "far")
    if "near" in fleet.members:
        fleet.kill("near")

        async def is_gone() -> bool:
            return not await running_on(fleet, "near", 0)

        await wait_until(is_gone, "the near worker is not heard of any more")
    await wait_until(lambda: fleet.is_up(fleet.members["far"]), "the far worker is up")
    return started


def start_near(near: Host, fleet: ProcessFleet, memory: MemoryGroup | None) -> None:
    """Start the worker `near` on the queue's host, with limited memory where possible."""
    fleet.add("worker", "near").within = (*(memory.within if memory else ()), *near.within)
    fleet.start("worker", "near")


async def ask(fleet: ProcessFleet, model: str) -> Call:
    client = Client(fleet.urls)
    wanted = Ask(model, "Once upon a time", NUM_TOKENS, tuple(GREEDY.items()))
    call = Call(wanted, "stream", time.monotonic())
    await client.ask(wanted, "stream", call)
    await client.close()
    assert call.is_complete
    return call


async def running_on(fleet: ProcessFleet, name: str, least: int = 1) -> bool:
    """Return whether a worker sends heartbeats and runs at least `least` requests."""
    beats = [beat for beat in (await fleet.bus.members.worker_beats()).values() if beat is not None]
    return any(beat.name == name and beat.running >= least for beat in beats)


async def test_a_network_cut_moves_streams_and_its_worker_joins_again(
    hosts_and_fleet: tuple[Host, ProcessFleet], memory: MemoryGroup | None
) -> None:
    near, fleet = hosts_and_fleet
    right = {model: (await ask(fleet, model)).attempts[-1].text for model in ("base", "one")}
    assert right["base"] != right["one"]
    streams = [asyncio.create_task(ask(fleet, model)) for model in ("base", "one") * 2]
    await wait_until(lambda: running_on(fleet, "far"), "the far worker runs them")
    near.run("ip link set cable1 down")
    start_near(near, fleet, memory)  # only now, so that the streams must move to it
    for call in await asyncio.gather(*streams):
        assert len(call.attempts) == 1, "the client did not notice"
        assert call.attempts[-1].text == right[call.ask.model]

    async def is_dead() -> bool:
        return not await running_on(fleet, "far", 0)

    await wait_until(is_dead, "the far worker is taken for dead")

    near.run("ip link set cable1 up")
    far = fleet.members["far"]
    again = "was declared dead; rejoining"
    await wait_until(lambda: again in far.log.read_text(), "the far worker hears that it is dead")
    await wait_until(lambda: running_on(fleet, "far", 0), "it is heard of again")
    assert far.is_running


async def test_a_worker_that_the_kernel_kills_for_its_memory_loses_no_stream(
    hosts_and_fleet: tuple[Host, ProcessFleet], memory: MemoryGroup | None
) -> None:
    """A worker that joins later continues the requests of `near`."""
    if memory is None:
        pytest.skip(f"{MEMORY}, the memory controller of cgroups v1, is not there or may not be written to")
    near, fleet = hosts_and_fleet
    start_near(near, fleet, memory)
    await wait_until(lambda: fleet.is_up(fleet.members["near"]), "the near worker is up")
    right = {model: (await ask(fleet, model)).attempts[-1].text for model in ("base", "one")}
    fleet.signal("far", signal.SIGTERM)
    await wait_until(lambda: not fleet.members["far"].is_running, "the far worker has left")
    streams = [asyncio.create_task(ask(fleet, model)) for model in ("base", "one") * 2]
    await wait_until(lambda: running_on(fleet, "near"), "the near worker runs them")
    await asyncio.to_thread(memory.exhaust)
    await wait_until(lambda: not fleet.members["near"].is_running, "there is no page left for it")
    assert memory.num_killed >= 2
    fleet.start("worker", "far")
    for call in await asyncio.gather(*streams):
        assert len(call.attempts) == 1, "the client did not notice"
        assert call.attempts[-1].text == right[call.ask.model]
