"""From the name in a request to its alias, once a store has settled it: the adapter is on disk, or it failed.

Asks the stores for adapters that a request names by their source, waits for them without holding up other requests, and
answers with a known failure until it may be tried again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from gateway.auth.callers import EVERYBODY, Caller
from protocol.queue.adapters import NameLimits
from protocol.queue.bus import CONNECTION_ERRORS, Bus, decode, now_ms
from protocol.runtime.adapter_refs import Reference, SourcePolicy, parse_reference
from protocol.runtime.fleet_secret import FleetSecret, owner_of
from protocol.runtime.guarded import FAILED
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import (
    AdapterRefused,
    BadRequest,
    Conflict,
    LorafleetError,
    ModelNotFound,
    NotFound,
    PermissionDenied,
    Unavailable,
)
from protocol.wire.keys import private_name

logger = logging.getLogger(__name__)

LISTEN_MS = 1000
STORE_TIMEOUT_MS = 10_000
"""Silence of all stores after which requests stop waiting for one."""

_ERRORS: dict[int, type[LorafleetError]] = {400: BadRequest, 403: PermissionDenied, 404: NotFound, 409: Conflict}


class Aliases:
    """Looks aliases up, and waits for those that are not settled."""

    def __init__(
        self, bus: Bus, settings: Settings, secret: FleetSecret | None, on_wait: Callable[[], object], poll_s: float
    ) -> None:
        """`on_wait` is called when a request begins to wait for a store, `poll_s` is the pause between looks then."""
        self._bus = bus
        self._on_wait = on_wait
        self._poll_s = poll_s
        self._policy = SourcePolicy.of(settings)
        self._refresh_ms = int(1000 * settings.refresh_s)
        self._access_ms = int(1000 * settings.access_check_s)
        self._asking: set[asyncio.Task[object]] = set()  # looks that nobody waits for
        self._secret = secret
        self._max_own, self._max_per_minute = settings.max_tenant_adapters, settings.max_registrations_per_minute
        self._waiters: dict[str, set[asyncio.Event]] = {}
        self._asked: dict[str, int] = {}  # private name -> unix ms, when a look that is still awaited was asked for
        self._failure: LorafleetError | None = None
        self._last_ids: dict[str, bytes] = {}  # how far the events are read
        self.listeners: list[Callable[[m.AdapterEvent], object]] = []  # called with every event

    async def listen(self) -> None:
        """Wait for the fleet's adapter events; wake the waiters of an alias that has changed."""
        stream = self._bus.keys.adapter_events
        self._last_ids = self._last_ids or {stream: await self._bus.streams.last_id(stream)}
        for entry, fields in (await self._bus.streams.read(self._last_ids, block_ms=LISTEN_MS)).get(stream, []):
            try:
                event = decode(fields.get(b"b", b""), m.AdapterEvent)
                for waiter in self._waiters.get(event.name, ()):
                    waiter.set()
                for listener in self.listeners:
                    listener(event)
            except Exception as error:  # noqa: BLE001  the event's edge: those behind it are not kept waiting
                FAILED.note("adapter events", error, f"the event {entry.decode()}")

    def fail_all(self, error: LorafleetError) -> None:
        """Raise an error in all who wait, now and later."""
        self._failure = error
        for waiter in [waiter for waiters in self._waiters.values() for waiter in waiters]:
            waiter.set()

    # ------------------------------------------------------------ for requests

    async def served(self, name: str, timeout_s: float, caller: Caller = EVERYBODY) -> m.Alias:
        """Return the alias of a name once its adapter is on disk: the caller's own, or else everybody's.

        Raises ModelNotFound; PermissionDenied, AdapterRefused and others with the reason why it is not served; and
        Unavailable if that takes longer than `timeout_s`.
        """
        own = await self._bus.adapters.alias(name, caller.name) if caller.name else None
        if own is not None:
            return await self.confirmed(await self._once_settled(own, timeout_s), timeout_s)
        if not caller.may_use(name):
            raise ModelNotFound(name)
        alias = await self._bus.adapters.alias(name)
        reference = parse_reference(name)
        if alias is not None and not alias.on_request:
            return await self._once_settled(alias, timeout_s)
        if reference is None:
            raise ModelNotFound(name)
        if reference.scheme not in self._policy.request_sources:
            raise ModelNotFound(name, f"Requests may not name {reference.scheme} adapters here: register it first.")
        as_fleet = self._policy.lends(reference)
        if as_fleet and not caller.may_use(reference.place):
            raise ModelNotFound(
                name
            )  # the fleet's credentials are lent for what the tenant sees, however it is spelled
        self._policy.check(reference, on_request=True, as_fleet=as_fleet)
        if alias is not None and alias.state == "on_disk":
            caller = replace(caller, token="")  # everybody's is there already
        return await self._from_source(name, reference, caller, timeout_s)

    async def _once_settled(self, alias: m.Alias, timeout_s: float) -> m.Alias:
        found: m.Alias | None = alias
        if not is_settled(alias):
            self._on_wait()
            found = await self.wait(alias.name, alias.tenant, lambda now: now is None or is_settled(now), timeout_s)
        if found is None or found.state == "unknown":
            raise ModelNotFound(alias.name)
        return _or_raise(found)

    async def _from_source(self, name: str, reference: Reference, caller: Caller, timeout_s: float) -> m.Alias:
        """Return the alias of a source; the stores check it again unless they did recently."""
        token = caller.token
        tenant = owner_of(token, self._secret)
        alias = await self._bus.adapters.alias(name, tenant)
        now = now_ms()
        if alias is not None and alias.state == "failed" and now < alias.retry_ms:
            raise error_of(alias)
        # What anyone may read at a commit is read by anyone for ever. A token's rights may change.
        is_fresh = alias is not None and ((reference.is_fixed and not token) or now < alias.asked_ms + self._refresh_ms)
        if alias is not None and alias.state == "on_disk" and is_fresh:
            return await self.confirmed(alias, timeout_s)
        self._on_wait()
        looked = await self._look(name, tenant, lambda: self._ask(name, reference, caller), timeout_s)
        return self._unless_unconfirmed(looked)

    async def confirmed(self, alias: m.Alias, timeout_s: float) -> m.Alias:
        """Return the alias of a name on disk, once its source has lately let the token read it that opens the name.

        What no tenant's token opens is returned at once. Otherwise the source is asked again every `access_check_s`:
        ahead of time while it is asked for often, so that nobody waits. Raises what the source answers; Unavailable
        when it does not answer.
        """
        age_ms = now_ms() - alias.confirmed_ms
        if not alias.confirmed_ms or age_ms < self._access_ms // 2:
            return alias
        if age_ms >= self._access_ms:
            self._on_wait()
            return self._unless_unconfirmed(
                await self._look(alias.name, alias.tenant, lambda: self._ask_again(alias), timeout_s)
            )
        if private_name(alias.name, alias.tenant) not in self._asked:
            task = asyncio.create_task(self._look_quietly(alias))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
        return alias

    def _unless_unconfirmed(self, alias: m.Alias) -> m.Alias:
        """Return an alias after a look, unless the source did not answer and had confirmed its token too long ago.

        Raises Unavailable.
        """
        if alias.reason and alias.confirmed_ms and now_ms() - alias.confirmed_ms >= self._access_ms:
            raise Unavailable(
                f"the source did not confirm that the token may still read `{alias.name}`: {alias.reason}",
                param="model",
                code="adapter_unavailable",
            )
        return alias

    async def _look_quietly(self, alias: m.Alias) -> None:
        """Have the stores look at the source of an alias; who asks for it later hears of the outcome."""
        try:
            await self._look(alias.name, alias.tenant, lambda: self._ask_again(alias), self._access_ms / 1000)
        except LorafleetError as error:
            logger.info("adapter %s cannot be confirmed: %s", alias.name, error)
        except CONNECTION_ERRORS as error:
            logger.warning("adapter %s cannot be confirmed: %s", alias.name, error)

    async def _look(self, name: str, tenant: str, ask: Callable[[], Awaitable[int]], timeout_s: float) -> m.Alias:
        """Have the stores look at a name's source, all who wait by one look; return the alias after it.

        `ask` asks the stores, and returns the time. Raises the reason why the name is not served.
        """
        key = private_name(name, tenant)
        asked_ms = self._asked.get(key, 0) or await ask()

        def is_answered(found: m.Alias | None) -> bool:
            return found is not None and is_settled(found) and found.asked_ms >= asked_ms

        try:
            found = await self.wait(name, tenant, is_answered, timeout_s)
        finally:
            if self._asked.get(key) == asked_ms:
                del self._asked[key]
        assert found is not None
        return _or_raise(found)

    async def _ask(self, name: str, reference: Reference, caller: Caller) -> int:
        """Have the stores look at a source; return when that was, unix ms.

        Raises BadRequest, Overloaded, Conflict, Unavailable.
        """
        tenant = owner_of(caller.token, self._secret)
        key = private_name(name, tenant)
        sealed = self.sealed(caller.token, key)
        asked_ms = self._asked[key] = now_ms()
        registration = m.Registration(
            name=name,
            source=reference.source,
            token=sealed,
            tenant=tenant,
            asked_ms=asked_ms,
            on_request=True,
            as_fleet=self._policy.lends(reference),
        )
        try:
            await self.register(registration, caller)
        except BaseException:
            del self._asked[key]
            raise
        return asked_ms

    async def _ask_again(self, alias: m.Alias) -> int:
        """Have the stores look at a registered name's source; return when that was. Raises ModelNotFound."""
        key = private_name(alias.name, alias.tenant)
        asked_ms = self._asked[key] = now_ms()
        if not await self._bus.adapters.ask_again(alias.name, alias.tenant, asked_ms):
            self._asked.pop(key, None)
            raise ModelNotFound(alias.name)
        return asked_ms

    async def register(self, registration: m.Registration, caller: Caller) -> None:
        """Write a registration that a caller asks for, within its limits. Raises Overloaded, Conflict, Unavailable."""
        limits = None if caller.is_admin else NameLimits(caller.name, self._max_own, self._max_per_minute)
        if not await self._bus.adapters.register(registration, limits=limits):
            raise Unavailable("too many adapters are registered", code="too_many_adapters")

    def sealed(self, token: str, key: str) -> str:
        """Return a token encrypted for Redis, under a private name. Raises BadRequest if this fleet has no secret."""
        if token and self._secret is None:
            raise BadRequest("this fleet has no secret, which is needed to store tokens: set LORAFLEET_SECRET_FILE")
        return self._secret.seal(token, key) if self._secret is not None else ""

    # ------------------------------------------------------------ waiting

    async def wait(
        self, name: str, tenant: str, is_over: Callable[[m.Alias | None], bool], timeout_s: float
    ) -> m.Alias | None:
        """Wait until a name's alias is as wanted, and return it.

        Raises Unavailable if that takes longer than `timeout_s` or no store is alive, and the error of `fail_all`.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._waiter(name) as waiter:
            while True:
                waiter.clear()
                if self._failure is not None:
                    raise self._failure
                alias = await self._bus.adapters.alias(name, tenant)
                if is_over(alias):
                    return alias
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise Unavailable(f"the adapter `{name}` is still being downloaded", code="adapter_loading")
                try:
                    async with asyncio.timeout(min(left_s, self._poll_s)):
                        await waiter.wait()
                except TimeoutError:
                    if not await self._bus.members.ids(self._bus.keys.stores, STORE_TIMEOUT_MS):
                        raise Unavailable("no adapter store is running", code="no_store") from None

    @contextmanager
    def _waiter(self, name: str) -> Iterator[asyncio.Event]:
        """Yield an event that is set when a name's alias may have changed."""
        waiter = asyncio.Event()
        waiters = self._waiters.setdefault(name, set())
        waiters.add(waiter)
        try:
            yield waiter
        finally:
            waiters.discard(waiter)
            if not waiters:
                self._waiters.pop(name, None)


def is_settled(alias: m.Alias) -> bool:
    """Return whether the stores are done with an alias for now: its adapter is on disk, or failed."""
    return alias.state in ("on_disk", "failed")


def _or_raise(alias: m.Alias) -> m.Alias:
    if alias.state == "failed":
        raise error_of(alias)
    return alias


def error_of(alias: m.Alias) -> LorafleetError:
    """Return the error of an alias that failed, as clients see it."""
    text = f"the adapter `{alias.name}` cannot be served: {alias.reason}"
    if alias.status >= 500:
        error: LorafleetError = Unavailable(text, param="model", code="adapter_unavailable")
        error.retry_after_s = max(1.0, (alias.retry_ms - now_ms()) / 1000)
        return error
    kind = _ERRORS.get(alias.status)
    if kind is None:
        return AdapterRefused([text])
    return kind(text, param="model", code="model_not_found" if alias.status == 404 else "adapter_refused")
