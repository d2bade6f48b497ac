"""The gateway's HTTP client for stores is created once, in a thread."""

from __future__ import annotations

import asyncio
import threading

import httpx2
import pytest

from gateway.http.http_client import HttpClient


class Watched(HttpClient):
    """Records the threads that create clients."""

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
    first.cancel()  # a cancelled caller does not affect the others
    clients = await asyncio.gather(*(stores.get() for _ in range(8)))
    assert len(set(map(id, clients))) == 1
    assert [thread is threading.main_thread() for thread in stores.threads] == [False]
    assert clients[0].headers["authorization"] == "Bearer secret"
    await stores.close()
    assert clients[0].is_closed


async def test_a_client_that_nobody_asked_for_is_never_made() -> None:
    stores = HttpClient()
    await stores.close()
    assert stores._making is None


class FailingOnce(HttpClient):
    """Fails to create its first client, as without free file descriptors."""

    num_made = 0

    def _make(self) -> httpx2.AsyncClient:
        self.num_made += 1
        if self.num_made == 1:
            raise OSError("too many open files")
        return super()._make()


async def test_a_client_that_could_not_be_made_is_made_by_the_next_call() -> None:
    stores = FailingOnce()
    with pytest.raises(OSError, match="too many"):
        await stores.get()
    client = await stores.get()
    assert client is await stores.get()
    await stores.close()


async def test_without_a_client_that_could_be_made_there_is_nothing_to_close() -> None:
    stores = FailingOnce()
    with pytest.raises(OSError, match="too many"):
        await stores.get()
    await stores.close()


async def test_uploads_that_take_long_hold_up_no_other_call() -> None:
    stores, release, begun = HttpClient(), asyncio.Event(), asyncio.Semaphore(0)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (await reader.readuntil(b"\r\n\r\n")).startswith(b"POST"):
            begun.release()
            await release.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        http = await stores.get()
        uploads = [asyncio.create_task(http.post(url, timeout=60)) for _ in range(128)]
        for _ in range(100):
            await begun.acquire()
        text = await http.get(url, timeout=httpx2.Timeout(60, pool=1))
        release.set()
        assert {text.status_code, *(sent.status_code for sent in await asyncio.gather(*uploads))} == {200}
    await stores.close()
