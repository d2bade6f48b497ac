"""The gateway's HTTP clients: of the adapter stores, and of a Prometheus."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from http.cookiejar import CookieJar, DefaultCookiePolicy

import anyio
import httpx2


class HttpClient:
    """One client for all that a gateway asks of stores or of a Prometheus, made by the first call that needs it.

    It is made in a thread, since it reads all certificates and imports what connections need: together 100 ms, in which
    an event loop would serve nobody.
    """

    def __init__(self, bearer: str = "") -> None:
        """bearer: authorizes at the stores, see `FleetSecret.bearer`; "" for a fleet without a secret."""
        self._headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        self._making: asyncio.Task[httpx2.AsyncClient] | None = None

    async def get(self) -> httpx2.AsyncClient:
        """Return the client, which has no time limit of its own: each request states one."""
        if self._making is None or (self._making.done() and self._making.exception()):
            self._making = asyncio.create_task(asyncio.to_thread(self._make))
        return await asyncio.shield(self._making)

    def _make(self) -> httpx2.AsyncClient:
        anyio.run(anyio.sleep, 0)  # imports anyio's backend, on a loop that ends here
        # Any number of connections: uploads may take minutes each, and nobody else's call is to wait for one to end.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=20)
        no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=()))  # one with an odd character fails all after it
        return httpx2.AsyncClient(headers=self._headers, cookies=no_cookies, trust_env=False, limits=limits)

    async def close(self) -> None:
        """Close the connections."""
        if self._making is not None:
            with suppress(Exception):  # whoever asked for a client that could not be made has been told
                await (await self._making).aclose()
