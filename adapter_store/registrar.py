"""Fetches registered adapters from the Hub or S3, keeps them up to date, and retries after failures.

Registrations are in Redis, so any store can continue what another was fetching when it died. A lease per name prevents
two stores from fetching it at the same time.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from adapter_store.bases import Bases
from adapter_store.catalogue import Catalogue, field_of
from adapter_store.mirror import Mirror
from adapter_store.sources import Changed, Source, SourceAccess
from adapter_store.timings import StoreTimings
from protocol.queue.bus import Bus, QueueError, now_ms
from protocol.runtime.adapter_refs import Reference, SourcePolicy, parse_source
from protocol.runtime.backoff import Backoff
from protocol.runtime.fleet_secret import FleetSecret
from protocol.wire.errors import AdapterRefused, BadRequest, ClientError, LorafleetError, PermissionDenied
from protocol.wire.messages import Alias, Registration

logger = logging.getLogger(__name__)

LEASE_MS = 15_000
"""Milliseconds until a name's lease expires; a store renews its leases at every tick."""


@dataclass(frozen=True, slots=True)
class FetchOutcome:
    """The outcome of this process's last fetch of a name."""

    registration: Registration
    ended_s: float  # monotonic time
    pause_s: float  # before the next fetch
    num_failures: int = 0
    refused: bool = False


class Registrar:
    """One store's work on the registrations of its fleet."""

    def __init__(
        self, bus: Bus, sources: Mapping[str, Source], mirror: Mirror, catalogue: Catalogue, policy: SourcePolicy,
        secret: FleetSecret | None = None, timings: StoreTimings | None = None, access_check_s: float = 60.0,
    ) -> None:  # fmt: skip
        """Start with nothing fetched.

        sources: by scheme. policy: which places are allowed. secret: decrypts the tokens of registrations.
        access_check_s: seconds for which a source's permission for a tenant's token is valid.
        """
        self._bus = bus
        self._sources = sources
        self._mirror = mirror
        self._catalogue = catalogue
        self._policy = policy
        self._secret = secret
        self._access_ms = int(1000 * access_check_s)
        self._timings = timings or StoreTimings()
        self._bases = Bases()
        self._busy: set[str] = set()
        self._outcomes: dict[str, FetchOutcome] = {}
        self._registrations: dict[str, Registration] = {}
        self._reload_at_s = 0.0  # monotonic time

    def set_bases(self, bases: Bases) -> None:
        """Set the changed bases that adapters must fit: every name is fetched again."""
        self._bases = bases
        self._outcomes.clear()

    async def tick(self, tasks: asyncio.TaskGroup, refresh_s: float, *, reload: bool) -> None:
        """Start the due fetches in `tasks` without waiting for them. A name is due again every `refresh_s` seconds.

        reload: whether registrations may have changed; without it they are also read at intervals.
        """
        await self._renew_leases()
        if reload or time.monotonic() >= self._reload_at_s:
            await self._reload()
        for field, registration in self._registrations.items():
            if field not in self._busy and self._is_due(field, registration):
                self._busy.add(field)
                tasks.create_task(self._update_leased(field, registration, refresh_s))

    async def _reload(self) -> None:
        """Read the registrations; remove names without one, and expired names that requests had registered."""
        self._reload_at_s = time.monotonic() + self._timings.reload_s
        self._registrations = await self._bus.adapters.registrations()
        for field in self._stale_requests():
            registration = self._registrations.pop(field)
            await self._bus.adapters.unregister(
                registration.name, registration.tenant, unless_asked_after=registration.asked_ms
            )
        for field, alias in list(self._catalogue.aliases.items()):
            if field in self._registrations or alias.is_folder:
                continue
            if not await self._bus.adapters.is_newer(field):  # otherwise stores of a newer release handle it
                self._outcomes.pop(field, None)
                await self._catalogue.remove(field)

    def _stale_requests(self) -> list[str]:
        """Return the fields of names registered by requests that have expired or exceed the limit."""
        timings, now = self._timings, now_ms()
        stale: list[str] = []
        kept: list[tuple[int, str]] = []
        for field, registration in self._registrations.items():
            if registration.on_request:
                outcome = self._outcomes.get(field)
                failed = outcome is not None and outcome.num_failures > 0
                forget_ms = timings.forget_refused_ms if failed else timings.forget_unused_ms
                if registration.asked_ms < now - forget_ms:
                    stale.append(field)
                else:
                    kept.append((registration.asked_ms, field))
        return stale + [field for _, field in sorted(kept)[: max(0, len(kept) - timings.max_on_request)]]

    def _is_due(self, field: str, registration: Registration) -> bool:
        alias = self._catalogue.aliases.get(field)
        if alias is not None and alias.is_folder and registration.source != alias.source:
            return False  # a folder of that name takes precedence
        outcome = self._outcomes.get(field)
        if outcome is None and alias is not None and alias.state == "failed" and registration.on_request:
            # Another store has failed, or this one before its restart.
            return registration.asked_ms > alias.asked_ms and now_ms() >= alias.retry_ms
        if outcome is None or _is_other(outcome.registration, registration):
            return True
        if alias is None and not outcome.num_failures:
            return True
        rested = time.monotonic() >= outcome.ended_s + outcome.pause_s
        if registration.asked_ms > outcome.registration.asked_ms:
            # A repeated registration is processed immediately; repeated requests for a failing name wait for the pause.
            return rested or not (registration.on_request and outcome.num_failures)
        return rested and not registration.on_request

    async def _renew_leases(self) -> None:
        await self._bus.adapters.renew_leases(self._busy, LEASE_MS)

    def accesses_to(self, digest: str) -> list[SourceAccess]:
        """Return the distinct rights with which the names of this content were fetched, those without a token first.

        Tokens that cannot be decrypted are left out.
        """
        found: set[SourceAccess] = set()
        for field, alias in self._catalogue.aliases.items():
            registration = self._registrations.get(field)
            if alias.digest == digest and registration is not None:
                with suppress(PermissionDenied):
                    found.add(self._access(field, registration))
        return sorted(found, key=lambda access: (access.token != "", not access.as_fleet, access.token))

    def _access(self, field: str, registration: Registration) -> SourceAccess:
        """Return the rights with which a registration is read. Raises PermissionDenied for an invalid token."""
        as_fleet = registration.as_fleet or registration.is_operators
        if not registration.token:
            return SourceAccess(as_fleet=as_fleet)
        if self._secret is None:
            raise PermissionDenied("this store has no secret, so it cannot decrypt the token")
        return SourceAccess(self._secret.open(registration.token, field), as_fleet)

    # ------------------------------------------------------------ one name

    async def _update_leased(self, field: str, registration: Registration, refresh_s: float) -> None:
        """Update one name unless another store holds its lease; an error affects only this name."""
        try:
            if not await self._bus.adapters.take_lease(field, LEASE_MS):
                return
            try:
                await self._update(field, registration, refresh_s)
            finally:
                await self._bus.adapters.release_lease(field)
        except QueueError as error:
            logger.warning("adapter %s will be fetched again later: %s", registration.name, error)
        except asyncio.CancelledError:
            raise
        except BaseException:  # including panics of Rust libraries
            logger.exception("adapter %s cannot be fetched", registration.name)
            self._note_failure(field, registration, self._timings.trouble, refused=False)
        finally:
            self._busy.discard(field)

    async def _update(self, field: str, registration: Registration, refresh_s: float) -> None:
        """Fetch the content of one name and publish it, or the reason why not."""
        alias = Alias(
            name=registration.name,
            tenant=registration.tenant,
            state="downloading",
            source=registration.source,
            registered=registration.source,
            asked_ms=registration.asked_ms,
            on_request=registration.on_request,
        )
        await self._catalogue.announce([alias])
        began_ms = now_ms()
        try:
            reference, source = self._place(registration)
            target = reference.source.partition(":")[2]
            access, tenant = self._access(field, registration), registration.tenant
            mirrored, base, record = await self._mirror.converted(
                lambda: self._bases.take(self._mirror, source, target, registration.base, access, tenant)
            )
            if record is None:
                return  # stays due until the base is known
        except (LorafleetError, OSError, Changed) as error:
            await self._fail(alias, registration, error)
            return
        # The content of a commit never changes, but a token's permission may.
        pause_s = math.inf if reference.is_fixed and not registration.token else refresh_s
        self._outcomes[field] = FetchOutcome(registration, time.monotonic(), pause_s)
        if field in self._registrations:
            digest, place = mirrored.digest, mirrored.version.source
            confirmed_ms = began_ms if registration.token and registration.tenant else 0
            served = msgspec.structs.replace(
                alias, state="on_disk", digest=digest, source=place, base=base, confirmed_ms=confirmed_ms
            )
            await self._catalogue.publish(served, record)
            logger.info("adapter %s is served: %.12s of %s", registration.name, digest, place)

    def _place(self, registration: Registration) -> tuple[Reference, Source]:
        """Return the reference to fetch and its source. Raises BadRequest, PermissionDenied."""
        reference = parse_source(registration.source)
        source = self._sources.get(reference.scheme) if reference else None
        if reference is None or source is None:
            raise BadRequest(f"{registration.source!r} is not a supported adapter source")
        as_fleet = registration.as_fleet or registration.is_operators
        self._policy.check(reference, on_request=registration.on_request, as_fleet=as_fleet)
        return reference, source

    async def _fail(self, alias: Alias, registration: Registration, error: LorafleetError | OSError | Changed) -> None:
        field = field_of(alias)
        if isinstance(error, LorafleetError):
            reason, status = error.message, error.status
        else:
            reason, status = str(error.strerror if isinstance(error, OSError) else error), 503
        logger.warning("adapter %s: %s", registration.name, reason)
        refused = isinstance(error, ClientError)
        timings = self._timings
        backoff = timings.refusal if refused else timings.trouble
        if isinstance(error, AdapterRefused) and not registration.on_request:  # each try may cost a conversion
            backoff = timings.content
        pause_s = self._note_failure(field, registration, backoff, refused=refused)
        if field not in self._registrations or await self._keep_serving(
            field, registration, reason, status, refused=refused
        ):
            return
        await self._catalogue.publish(
            msgspec.structs.replace(
                alias, state="failed", reason=reason, status=status, retry_ms=now_ms() + int(1000 * pause_s)
            )
        )

    async def _keep_serving(
        self, field: str, registration: Registration, reason: str, status: int, *, refused: bool
    ) -> bool:
        """Keep serving the name's old content, with the reason why it is not updated; return False if impossible.

        Old content is dropped if its own source now refuses it. It is kept if another source or base was requested and
        refuses. Content that a tenant's token unlocked is kept as long as the last confirmation is valid.
        """
        known = self._catalogue.aliases.get(field)
        base = self._bases.get(known.base) if known is not None else None
        if known is None or known.state != "on_disk" or base is None:
            return False
        moving = known.registered != registration.source or registration.base not in ("", known.base)
        if (refused and not moving) or 0 < known.confirmed_ms <= now_ms() - self._access_ms:
            return False
        try:
            record = await self._mirror.describe(known.digest, known.source, base)
        except (AdapterRefused, Changed):
            return False
        asked = registration.source if known.registered != registration.source else f"with {registration.base}"
        said = f"not {asked}: {reason}" if moving else f"may be out of date: {reason}"
        served = msgspec.structs.replace(known, reason=said, status=status, asked_ms=registration.asked_ms)
        await self._catalogue.publish(served, record)
        return True

    def _note_failure(self, field: str, registration: Registration, backoff: Backoff, *, refused: bool) -> float:
        """Count a failure; return the seconds until the next fetch."""
        last = self._outcomes.get(field)
        failures = 1 + (last.num_failures if last is not None and last.refused == refused else 0)
        pause_s = backoff.pause_s(failures)
        self._outcomes[field] = FetchOutcome(registration, time.monotonic(), pause_s, failures, refused)
        return pause_s


def _is_other(one: Registration, other: Registration) -> bool:
    """Return whether two registrations of a name may refer to different adapters."""
    return (one.source, one.token, one.base) != (other.source, other.token, other.base)
