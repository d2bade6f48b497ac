"""Concurrent calls that wait for workers or search the queue share one read, done in small pieces."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from helpers.script_queue import make_body, make_submit

from gateway.adapters.catalogue import CatalogueCopy
from gateway.adapters.memory import AT_ONCE, POLL_S, AdapterMemory
from gateway.adapters.operations import AdapterOperations, Unloaded
from gateway.auth.callers import Caller
from gateway.http.http_client import HttpClient
from protocol.queue.books.api_keys import Tenant
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import ModelNotFound
from protocol.wire.keys import private_name

DIGEST = "ab" * 32


def operations_on(bus: Any, aliases: Any = None, catalogue: Any = None) -> AdapterOperations:
    aliases = aliases or SimpleNamespace(listeners=[])
    return AdapterOperations(bus, Settings(api_keys=True), aliases, catalogue, HttpClient())


async def test_all_who_wait_for_workers_share_a_look() -> None:
    num_looks = 0

    async def worker_beats() -> dict[str, m.WorkerBeat]:
        nonlocal num_looks
        num_looks += 1
        return {"w1": m.WorkerBeat(wid="w1", name="w1", capacity=1)}

    operations = operations_on(SimpleNamespace(members=SimpleNamespace(worker_beats=worker_beats)))
    num = 300
    alias = m.Alias(name="a", state="on_disk")
    waits = (operations._wait_workers(alias, lambda beat: False, 3 * POLL_S) for _ in range(num))
    waited = await asyncio.gather(*waits)
    assert waited == [False] * num
    assert num_looks <= num + 10, "one each when they come, and then one for all"


async def test_a_look_that_fails_fails_once_for_each_and_the_next_is_new() -> None:
    failures = [ConnectionError("gone")]

    async def worker_beats() -> dict[str, m.WorkerBeat]:
        if failures:
            raise failures.pop()
        return {"w1": m.WorkerBeat(wid="w1", name="w1", capacity=1)}

    memory = AdapterMemory(SimpleNamespace(members=SimpleNamespace(worker_beats=worker_beats)), HttpClient())  # type: ignore[arg-type]
    leaves = asyncio.create_task(memory.next_beats())
    told = await asyncio.gather(*(memory.next_beats() for _ in range(3)), leaves, return_exceptions=True)
    assert [type(one) for one in told] == [ConnectionError] * 4
    assert [beat.wid for beat in await memory.next_beats()] == ["w1"]


async def test_a_long_queue_is_looked_through_in_pieces(bus: Bus) -> None:
    num, wanted = 3 * AT_ONCE + 5, {5, AT_ONCE, 3 * AT_ONCE + 1}
    for number in range(num):
        submit = make_submit(f"r{number}", digest=DIGEST if number in wanted else "", tenant="a")
        await bus.submit("interactive", [(submit, make_body())], max_queued=2 * num)
    await bus._redis.xadd(bus.keys.sub("interactive"), {"b": b"\xff no message"})
    pieces: list[int] = []
    queued = bus.request_lists.queued

    async def counted(cls: str, after: str, limit: int) -> Any:
        found = await queued(cls, after, limit)
        pieces.append(len(found))
        return found

    bus.request_lists.queued = counted  # type: ignore[method-assign]
    assert await AdapterMemory(bus, HttpClient()).requests(DIGEST) == [f"r{number}" for number in sorted(wanted)]
    assert max(pieces) == AT_ONCE


async def test_a_name_that_is_unloaded_many_times_at_once_is_unloaded_once(bus: Bus) -> None:
    """Concurrent unloads of a name share all reads, of the catalogue and, with `force`, of the queue."""
    names, num_read, ended = ["own-0", "own-1", "own-2"], 0, []

    class Counted(CatalogueCopy):
        async def _read(self) -> None:
            nonlocal num_read
            num_read += 1
            await super()._read()

    class Store:
        """Removes names, as a store does."""

        def __init__(self) -> None:
            self.listeners: list[Any] = []

        async def wait(self, name: str, tenant: str, is_over: Any, timeout_s: float) -> None:
            await bus._redis.hdel(bus.keys.adapters, private_name(name, tenant))
            await bus._redis.incr(bus.keys.adapters_stamp)

    for name in names:
        digest = name.removeprefix("own-") * 64
        alias = m.Alias(name=name, tenant="a", state="on_disk", digest=digest, source=f"local:{name}", created_ms=1)
        await bus._redis.hset(bus.keys.adapters, private_name(name, "a"), m.encode(alias))
    operations = operations_on(bus, Store(), Counted(bus))

    async def end_requests(digest: str, error: object, tenant: str | None = None) -> int:
        ended.append(digest)
        return 0

    operations.memory.end_requests = end_requests  # type: ignore[method-assign]
    caller = Caller(Tenant("a"), ("adapters",))
    done = await asyncio.gather(
        *(operations.unload(name, caller, "a", force=True, blob=False, wait_s=0.0) for name in [*names, *50 * names]),
        return_exceptions=True,
    )
    assert [one.name for one in done if isinstance(one, Unloaded)] == names
    assert sum(isinstance(one, ModelNotFound) for one in done) == 150
    assert ended == ["0" * 64, "1" * 64, "2" * 64]
    assert num_read == 3
    for task in operations._freeing:
        task.cancel()
    await asyncio.gather(*operations._freeing, return_exceptions=True)
