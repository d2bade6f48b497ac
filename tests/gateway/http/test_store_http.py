"""The gateway's client of the stores is made once, beside the event loop."""

from __future__ import annotations

import asyncio
import threading

import httpx2

from gateway.http.store_http import StoreHttp


class Watched(StoreHttp):
    """Notes in which threads it makes clients."""

    def __init__(self, bearer: str) -> None:
        super().__init__(bearer)
        self.threads: list[threading.Thread] = []

    def _make(self) -> httpx2.AsyncClient:
        self.threads.append(threading.current_thread())
        return super()._make()


async def test_many_calls_share_a_client_that_was_made_in_a_thread() -> None:
    stores = Watched("secret")
    first = asyncio.create_task(stores.get())
    await asyncio.sleep(0)
    first.cancel()  # a client that goes takes nothing from the others
    clients = await asyncio.gather(*(stores.get() for _ in range(8)))
    assert len(set(map(id, clients))) == 1
    assert [thread is threading.main_thread() for thread in stores.threads] == [False]
    assert clients[0].headers["authorization"] == "Bearer secret"
    await stores.close()
    assert clients[0].is_closed


async def test_a_client_that_nobody_asked_for_is_never_made() -> None:
    stores = StoreHttp()
    await stores.close()
    assert stores._making is None
