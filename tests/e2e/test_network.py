"""A worker on another host whose cable is pulled: packets are lost, nothing is refused, nobody is told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from factories import make_adapter, make_tiny_model
from hosts import Host, relay, two_hosts
from waiting import wait_until

from chaos.asks import GREEDY, Ask
from chaos.client import Call, Client
from chaos.fleet import ProcessFleet, Shape

NUM_TOKENS = 900
PORT = 7001

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hosts_and_fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Host, ProcessFleet]]:
    """Worker `far` reaches the queue through a cable; `near` is beside it."""
    folder: Path = tmp_path_factory.mktemp("fleet")
    model = make_tiny_model(folder / "model", max_len=12_000)
    make_adapter(folder / "adapters" / "one", model, seed=1)
    with two_hosts() as (near, far):
        running = ProcessFleet.prepare(
            folder,
            model,
            folder / "adapters",
            durable=False,
            request_timeout_s=200,
            secret="the fleet of this test",
        )
        with relay(near, PORT, running.queue.socket) as queue:
            running.add("store", store_host=near.address).within = near.within
            running.add("worker", "far", redis_url=f"redis://{queue}").within = far.within
            try:
                await running.start_all(Shape(workers=("far",)))
                yield near, running
            finally:
                await running.close()


async def ask(fleet: ProcessFleet, model: str) -> Call:
    client = Client(fleet.urls)
    wanted = Ask(model, "Once upon a time", NUM_TOKENS, tuple(GREEDY.items()))
    call = Call(wanted, "stream", time.monotonic())
    await client.ask(wanted, "stream", call)
    await client.close()
    assert call.is_complete
    return call


async def running_on(fleet: ProcessFleet, name: str) -> int | None:
    """Return how many requests a worker says it runs; None while it is not heard."""
    for beat in (await fleet.bus.worker_beats()).values():
        if beat is not None and beat.name == name:
            return beat.running
    return None


async def test_a_network_cut_moves_streams_and_a_worker_from_behind_it_joins_again(
    hosts_and_fleet: tuple[Host, ProcessFleet],
) -> None:
    near, fleet = hosts_and_fleet
    right = {model: (await ask(fleet, model)).attempts[-1].text for model in ("base", "one")}
    assert right["base"] != right["one"]
    streams = [asyncio.create_task(ask(fleet, model)) for model in ("base", "one") * 2]
    await wait_until(lambda: running_on(fleet, "far"), "the far worker runs them", timeout_s=60)
    near.run("ip link set cable1 down")
    fleet.add("worker", "near").within = near.within
    fleet.start("worker", "near")  # only now: so the streams must move here
    for call in await asyncio.gather(*streams):
        assert len(call.attempts) == 1, "the client did not notice"
        assert call.attempts[-1].text == right[call.ask.model]
    assert await running_on(fleet, "far") is None

    near.run("ip link set cable1 up")
    far = fleet.members["far"]
    await wait_until(lambda: fleet.is_up(far), "the far worker is heard of again", timeout_s=60)
    fleet.kill("near")
    for model, text in right.items():
        call = await ask(fleet, model)
        assert call.attempts[-1].text == text
    assert far.is_running
    assert "was taken for dead; joining again" in far.log.read_text()
