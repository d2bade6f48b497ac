"""Requests that are repeated at the next gateway until one answers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx2

from chaos.clients.client import GIVE_UP_S, PAUSE_S


class Insistent:
    """Sends requests to the gateways at `urls` in turn; they may die."""

    def __init__(self, urls: Sequence[str], key: str) -> None:
        """key: the client's API key; "" for a fleet without keys."""
        self._urls = urls
        self._next = 0
        limits = httpx2.Limits(max_keepalive_connections=0)  # a connection from before a kill would only fail
        shown = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx2.AsyncClient(timeout=30, trust_env=False, limits=limits, headers=shown)

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def ask(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """Return the answer, or {"error": …}. Retry temporary refusals and broken connections at the next gateway."""
        began_s = time.monotonic()
        while time.monotonic() < began_s + GIVE_UP_S:
            with contextlib.suppress(httpx2.TransportError):
                answer = await self._http.request(method, self._url(path), **options)
                if answer.is_success:
                    is_json = answer.headers["content-type"].startswith("application/json")
                    return answer.json() if is_json else {"raw": answer.content}
                if answer.status_code not in (429, 503):
                    return {"error": f"{method} {path}: {answer.status_code} {answer.text}"}
            await asyncio.sleep(PAUSE_S)
        return {"error": f"{method} {path} was never answered"}

    async def read(self, path: str) -> AsyncIterator[bytes]:
        """Yield the bytes of one stream as they arrive, until it ends, breaks off or is refused."""
        with contextlib.suppress(httpx2.TransportError):
            async with self._http.stream("GET", self._url(path)) as answer:
                if answer.status_code == 200:
                    async for part in answer.aiter_raw():
                        yield part

    def _url(self, path: str) -> str:
        self._next += 1
        return self._urls[self._next % len(self._urls)] + path
