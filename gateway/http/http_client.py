"""The gateway's HTTP clients, for adapter stores and for Prometheus."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from http.cookiejar import CookieJar, DefaultCookiePolicy

import anyio
import httpx2


class HttpClient:
    """One shared client for requests to stores or to Prometheus, created on first use.

    It is created in a thread: loading certificates and importing connection modules takes 100 ms, which would block the
    event loop.
    """

    def __init__(self, bearer: str = "") -> None:
        """bearer: authenticates at the stores, see `FleetSecret.bearer`; "" for a fleet without a secret."""
        self._headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        self._making: asyncio.Task[httpx2.AsyncClient] | None = None

    async def get(self) -> httpx2.AsyncClient:
        """Return the client. It has no default timeout: each request sets one."""
        if self._making is None or (self._making.done() and self._making.exception()):
            self._making = asyncio.create_task(asyncio.to_thread(self._make))
        return await asyncio.shield(self._making)

    def _make(self) -> httpx2.AsyncClient:
        anyio.run(anyio.sleep, 0)  # imports anyio's backend, on a temporary loop
        # Unlimited connections: an upload may take minutes, and other requests must not wait for it.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=20)
        no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=()))  # an invalid one would break later requests
        return httpx2.AsyncClient(headers=self._headers, cookies=no_cookies, trust_env=False, limits=limits)

    async def close(self) -> None:
        """Close the connections."""
        if self._making is not None:
            with suppress(Exception):  # a failed creation was raised to its callers
                await (await self._making).aclose()
