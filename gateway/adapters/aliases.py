"""Resolves the name in a call to its alias, once a store has settled it: the adapter is on disk, or it failed.

Asks the stores for adapters that a call names by source, waits for them without delaying other calls, and repeats a
known failure until it may be retried.
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
"""Milliseconds without a heartbeat from any store after which calls stop waiting."""

_ERRORS: dict[int, type[LorafleetError]] = {400: BadRequest, 403: PermissionDenied, 404: NotFound, 409: Conflict}


class Aliases:
    """Looks up aliases, and waits for those that are not settled."""

    def __init__(
        self, bus: Bus, settings: Settings, secret: FleetSecret | None, on_wait: Callable[[], object], poll_s: float
    ) -> None:
        """on_wait: called when a call begins to wait for a store; poll_s: seconds between checks while it waits."""
        self._bus = bus
        self._on_wait = on_wait
        self._poll_s = poll_s
        self._policy = SourcePolicy.of(settings)
        self._refresh_ms = int(1000 * settings.refresh_s)
        self._access_ms = int(1000 * settings.access_check_s)
        self._asking: set[asyncio.Task[object]] = set()  # background access checks
        self._secret = secret
        self._max_own, self._max_per_minute = settings.max_tenant_adapters, settings.max_registrations_per_minute
        self._waiters: dict[str, set[asyncio.Event]] = {}
        self._asked: dict[str, int] = {}  # private name -> unix ms of a pending request to the stores
        self._failure: LorafleetError | None = None
        self._last_ids: dict[str, bytes] = {}  # id of the last event read
        self.listeners: list[Callable[[m.AdapterEvent], object]] = []  # called with every event

    async def listen(self) -> None:
        """Read the fleet's adapter events; wake the waiters of changed aliases."""
        stream = self._bus.keys.adapter_events
        self._last_ids = self._last_ids or {stream: await self._bus.streams.last_id(stream)}
        for entry, fields in (await self._bus.streams.read(self._last_ids, block_ms=LISTEN_MS)).get(stream, []):
            try:
                event = decode(fields.get(b"b", b""), m.AdapterEvent)
                for waiter in self._waiters.get(event.name, ()):
                    waiter.set()
                for listener in self.listeners:
                    listener(event)
            except Exception as error:  # noqa: BLE001  later events must still be processed
                FAILED.note("adapter events", error, f"the event {entry.decode()}")

    def fail_all(self, error: LorafleetError) -> None:
        """Raise an error in all waiting calls, now and later."""
        self._failure = error
        for waiter in [waiter for waiters in self._waiters.values() for waiter in waiters]:
            waiter.set()

    # ------------------------------------------------------------ for calls

    async def served(self, name: str, timeout_s: float, caller: Caller = EVERYBODY) -> m.Alias:
        """Return the alias of a name once its adapter is on disk: the caller's own, else the shared one.

        Raises ModelNotFound; PermissionDenied, AdapterRefused and others if it cannot be served; and Unavailable if
        that takes longer than `timeout_s`.
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
            )  # the fleet's credentials are only used for adapters that the tenant sees, however the source is spelled
        self._policy.check(reference, on_request=True, as_fleet=as_fleet)
        if alias is not None and alias.state == "on_disk":
            caller = replace(caller, token="")  # the shared one is there, so no token is needed
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
        """Return the alias of a source, after the stores have checked the source, unless they did so recently."""
        token = caller.token
        tenant = owner_of(token, self._secret)
        alias = await self._bus.adapters.alias(name, tenant)
        now = now_ms()
        if alias is not None and alias.state == "failed" and now < alias.retry_ms:
            raise error_of(alias)
        # Public content at a fixed commit never changes; the rights of a token may.
        is_fresh = alias is not None and ((reference.is_fixed and not token) or now < alias.asked_ms + self._refresh_ms)
        if alias is not None and alias.state == "on_disk" and is_fresh:
            return await self.confirmed(alias, timeout_s)
        self._on_wait()
        looked = await self._look(name, tenant, lambda: self._ask(name, reference, caller), timeout_s)
        return self._unless_unconfirmed(looked)

    async def confirmed(self, alias: m.Alias, timeout_s: float) -> m.Alias:
        """Return an alias on disk, once its source has recently confirmed that the tenant's token may read it.

        An alias without such a token is returned at once. Otherwise the source is asked again every `access_check_s`;
        for names in use ahead of time, so that no call waits. Raises the source's refusal; Unavailable if it does not
        respond.
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
        """Return an alias after a check, unless the source did not respond and its last confirmation is too old.

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
        """Have the stores check an alias's source in the background; the outcome is stored in the alias."""
        try:
            await self._look(alias.name, alias.tenant, lambda: self._ask_again(alias), self._access_ms / 1000)
        except LorafleetError as error:
            logger.info("adapter %s cannot be confirmed: %s", alias.name, error)
        except CONNECTION_ERRORS as error:
            logger.warning("adapter %s cannot be confirmed: %s", alias.name, error)

    async def _look(self, name: str, tenant: str, ask: Callable[[], Awaitable[int]], timeout_s: float) -> m.Alias:
        """Have the stores check a name's source, once for all concurrent callers; return the alias afterwards.

        ask: asks the stores, and returns the time in unix ms. Raises the error of an alias that failed.
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
        """Have the stores fetch a source; return the time of the request in unix ms.

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
        """Have the stores check a registered name's source; return the time in unix ms. Raises ModelNotFound."""
        key = private_name(alias.name, alias.tenant)
        asked_ms = self._asked[key] = now_ms()
        if not await self._bus.adapters.ask_again(alias.name, alias.tenant, asked_ms):
            self._asked.pop(key, None)
            raise ModelNotFound(alias.name)
        return asked_ms

    async def register(self, registration: m.Registration, caller: Caller) -> None:
        """Write a caller's registration, within the caller's limits. Raises Overloaded, Conflict, Unavailable."""
        limits = None if caller.is_admin else NameLimits(caller.name, self._max_own, self._max_per_minute)
        if not await self._bus.adapters.register(registration, limits=limits):
            raise Unavailable("too many adapters are registered", code="too_many_adapters")

    def sealed(self, token: str, key: str) -> str:
        """Return a token encrypted for the queue, bound to a private name.

        Raises BadRequest if the fleet has no secret.
        """
        if token and self._secret is None:
            raise BadRequest("this fleet has no secret, which is needed to store tokens: set LORAFLEET_SECRET_FILE")
        return self._secret.seal(token, key) if self._secret is not None else ""

    # ------------------------------------------------------------ waiting

    async def wait(
        self, name: str, tenant: str, is_over: Callable[[m.Alias | None], bool], timeout_s: float
    ) -> m.Alias | None:
        """Wait until `is_over` holds for a name's alias, and return it.

        Raises Unavailable after `timeout_s` or if no store is alive, and the error of `fail_all`.
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
        """Yield an event that is set when the name's alias may have changed."""
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
    """Return whether the stores have finished with an alias: its adapter is on disk, or failed."""
    return alias.state in ("on_disk", "failed")


def _or_raise(alias: m.Alias) -> m.Alias:
    if alias.state == "failed":
        raise error_of(alias)
    return alias


def error_of(alias: m.Alias) -> LorafleetError:
    """Return the error for clients of an alias that failed."""
    text = f"the adapter `{alias.name}` cannot be served: {alias.reason}"
    if alias.status >= 500:
        error: LorafleetError = Unavailable(text, param="model", code="adapter_unavailable")
        error.retry_after_s = max(1.0, (alias.retry_ms - now_ms()) / 1000)
        return error
    kind = _ERRORS.get(alias.status)
    if kind is None:
        return AdapterRefused([text])
    return kind(text, param="model", code="model_not_found" if alias.status == 404 else "adapter_refused")
