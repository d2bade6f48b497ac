"""From the name in a request to an alias that is settled: served, or failed for a reason. Asks the stores for what
lives elsewhere, waits for it without disturbing others, and repeats what is known to have failed until it may be tried
again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from gateway.auth.callers import EVERYBODY, Caller
from protocol.queue.bus import CONNECTION_ERRORS, Bus, decode, now_ms
from protocol.runtime.fleet_secret import FleetSecret, owner_of
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.adapter_refs import Policy, Reference, parse_reference
from protocol.wire.errors import (
    AdapterRefused,
    BadRequest,
    Conflict,
    LorafleetError,
    ModelNotFound,
    NotFound,
    PermissionDenied,
    ProtocolError,
    Unavailable,
)
from protocol.wire.keys import private_name

logger = logging.getLogger(__name__)

LISTEN_MS = 1000
LOOK_S = 2.0
"""Pause after which a waiter looks again, should an event have been lost."""

STORE_TIMEOUT_MS = 10_000
"""Silence of every store after which nobody waits for one any more."""

_ERRORS: dict[int, type[LorafleetError]] = {400: BadRequest, 403: PermissionDenied, 404: NotFound, 409: Conflict}


class Names:
    """The names of adapters, as requests use them."""

    def __init__(self, bus: Bus, settings: Settings, secret: FleetSecret | None) -> None:
        self._bus = bus
        self._policy = Policy.of(settings)
        self._refresh_ms = int(1000 * settings.refresh_s)
        self._secret = secret
        self._waiters: dict[str, set[asyncio.Event]] = {}
        self._asked: dict[str, int] = {}  # field -> when a look that is still awaited was asked for
        self._failure: LorafleetError | None = None
        self.hearers: list[Callable[[m.AdapterEvent], object]] = []  # told of every event

    async def listen(self) -> None:
        """Wake those who wait for a name when something happens to it, until cancelled."""
        stream = self._bus.keys.adapter_events
        last_ids: dict[str, bytes] = {}
        while True:
            try:
                last_ids = last_ids or {stream: await self._bus.streams.last_id(stream)}
                for _, fields in (await self._bus.streams.read(last_ids, block_ms=LISTEN_MS)).get(stream, []):
                    told = decode(fields[b"b"], m.AdapterEvent)
                    for event in self._waiters.get(told.name, ()):
                        event.set()
                    for hear in self.hearers:
                        hear(told)
            except CONNECTION_ERRORS as error:
                logger.warning("cannot hear of adapters: %s", error)
                await asyncio.sleep(LISTEN_MS / 1000)
            except ProtocolError:
                logger.exception("an event cannot be read")

    def fail_all(self, error: LorafleetError) -> None:
        """End everybody's waiting."""
        self._failure = error
        for event in [event for events in self._waiters.values() for event in events]:
            event.set()

    # ------------------------------------------------------------ a request's name

    async def served(self, name: str, timeout_s: float, caller: Caller = EVERYBODY) -> m.Alias:
        """Return the alias of a name, once it is served: the caller's own, or everybody's if the caller may use that.

        Raises ModelNotFound, PermissionDenied, AdapterRefused and others with the reason why it is not, Unavailable.
        """
        own = await self._bus.adapters.alias(name, caller.name) if caller.name else None
        if own is not None:
            return await self._settled(own, timeout_s, caller)
        if not caller.may_use(name):
            raise ModelNotFound(name)
        alias = await self._bus.adapters.alias(name)
        reference = parse_reference(name)
        if alias is not None and not alias.on_request:
            return await self._settled(alias, timeout_s, caller)
        if reference is None:
            raise ModelNotFound(name)
        if reference.scheme not in self._policy.request_sources:
            raise ModelNotFound(name, f"Requests may not name {reference.scheme} adapters here: register it first.")
        self._policy.check(reference, on_request=True)
        if alias is not None and alias.state == "on_disk":
            caller = replace(caller, token="")  # everybody's is there
        return await self._looked_up(name, reference, caller, timeout_s)

    async def _settled(self, alias: m.Alias, timeout_s: float, caller: Caller) -> m.Alias:
        found: m.Alias | None = alias
        if not is_settled(alias):
            caller.preparation.end()
            found = await self.wait(alias.name, alias.tenant, lambda now: now is None or is_settled(now), timeout_s)
        if found is None or found.state == "unknown":
            raise ModelNotFound(alias.name)
        return _or_raise(found)

    async def _looked_up(self, name: str, reference: Reference, caller: Caller, timeout_s: float) -> m.Alias:
        """Return what a place holds, by a look at it that is fresh enough; a failure is told again for a while."""
        token = caller.token
        tenant = owner_of(token)
        field = private_name(name, tenant)
        forever = reference.is_fixed and not token  # what a commit holds never changes; who may read it does
        alias = await self._bus.adapters.alias(name, tenant)
        now = now_ms()
        if alias is not None and alias.state == "failed" and now < alias.retry_ms:
            raise error_of(alias)
        if alias is not None and alias.state == "on_disk" and (forever or now < alias.asked_ms + self._refresh_ms):
            return alias
        asked_ms = self._asked.get(field, 0) or await self._ask(name, reference, token)

        def is_answered(found: m.Alias | None) -> bool:
            return found is not None and is_settled(found) and found.asked_ms >= asked_ms

        caller.preparation.end()
        try:
            found = await self.wait(name, tenant, is_answered, timeout_s)
        finally:
            if self._asked.get(field) == asked_ms:
                del self._asked[field]
        assert found is not None
        return _or_raise(found)

    async def _ask(self, name: str, reference: Reference, token: str) -> int:
        """Have the stores look at a place; return when that was, unix ms. Raises BadRequest, Unavailable."""
        tenant = owner_of(token)
        field = private_name(name, tenant)
        sealed = self.sealed(token, field)
        asked_ms = self._asked[field] = now_ms()
        registration = m.Registration(
            name=name, source=reference.source, token=sealed, tenant=tenant, asked_ms=asked_ms, on_request=True
        )
        if not await self._bus.adapters.register(registration):
            del self._asked[field]
            raise Unavailable("too many adapters are registered", code="too_many_adapters")
        return asked_ms

    def sealed(self, token: str, field: str) -> str:
        """Return a token as it may lie in Redis. Raises BadRequest when this fleet cannot keep one."""
        if token and self._secret is None:
            raise BadRequest("this fleet has no secret, without which it keeps no tokens: set LORAFLEET_SECRET_FILE")
        return self._secret.seal(token, field) if self._secret is not None else ""

    # ------------------------------------------------------------ waiting

    async def wait(
        self, name: str, tenant: str, is_over: Callable[[m.Alias | None], bool], timeout_s: float
    ) -> m.Alias | None:
        """Wait until a name's alias is as wanted. Raises Unavailable when it takes too long or no store lives."""
        deadline_s = time.monotonic() + timeout_s
        with self._woken(name) as event:
            while True:
                event.clear()
                if self._failure is not None:
                    raise self._failure
                alias = await self._bus.adapters.alias(name, tenant)
                if is_over(alias):
                    return alias
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise Unavailable(f"the adapter `{name}` is still being downloaded", code="adapter_loading")
                try:
                    async with asyncio.timeout(min(left_s, LOOK_S)):
                        await event.wait()
                except TimeoutError:
                    if not await self._bus.members.ids(self._bus.keys.stores, STORE_TIMEOUT_MS):
                        raise Unavailable("no adapter store is running", code="no_store") from None

    @contextmanager
    def _woken(self, name: str) -> Iterator[asyncio.Event]:
        event = asyncio.Event()
        waiters = self._waiters.setdefault(name, set())
        waiters.add(event)
        try:
            yield event
        finally:
            waiters.discard(event)
            if not waiters:
                self._waiters.pop(name, None)


def is_settled(alias: m.Alias) -> bool:
    """Tell whether the stores have come to an end with a name, for now."""
    return alias.state in ("on_disk", "failed")


def _or_raise(alias: m.Alias) -> m.Alias:
    if alias.state == "failed":
        raise error_of(alias)
    return alias


def error_of(alias: m.Alias) -> LorafleetError:
    """Return why a name is not served, as its clients see it."""
    text = f"the adapter `{alias.name}` cannot be served: {alias.reason}"
    if alias.status >= 500:
        error: LorafleetError = Unavailable(text, param="model", code="adapter_unavailable")
        error.retry_after_s = max(1.0, (alias.retry_ms - now_ms()) / 1000)
        return error
    kind = _ERRORS.get(alias.status)
    if kind is None:
        return AdapterRefused([text])
    return kind(text, param="model", code="model_not_found" if alias.status == 404 else "adapter_refused")
