"""Makes registrations true: each name registered from the Hub or S3 is fetched, kept fresh, retried, or says why not.

Registrations lie in Redis, so that any store can take up what another was fetching when it died; a lease keeps two
from fetching the same at once.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from adapter_store.catalogue import Catalogue, field_of
from adapter_store.mirror import Mirror
from adapter_store.sources import Changed, Source
from protocol.queue.bus import Bus, QueueError, now_ms
from protocol.runtime.backoff import REFUSAL, TROUBLE
from protocol.runtime.fleet_secret import FleetSecret
from protocol.wire.adapter_refs import Policy, Reference, parse_source
from protocol.wire.errors import AdapterRefused, BadRequest, ClientError, LorafleetError, PermissionDenied
from protocol.wire.messages import Alias, Registration, ServedModel

logger = logging.getLogger(__name__)

LEASE_MS = 15_000
RELOAD_S = 10.0
FORGET_REFUSED_MS = 600_000
"""A name from a request that could not be served is forgotten when nobody has asked for it as long."""
FORGET_UNUSED_MS = 7 * 86_400_000
"""So is one that was served. Its content stays on disk until the space is needed."""
MAX_ON_REQUEST = 5000
"""Names from requests that are kept; the ones not asked for the longest go first."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the last try of this process for a name ended."""

    registration: Registration
    ended_s: float  # monotonic
    pause_s: float  # before the next try
    num_failures: int = 0
    refused: bool = False


class Registrar:
    """One store's share in the registrations."""

    def __init__(
        self, bus: Bus, sources: Mapping[str, Source], mirror: Mirror, catalogue: Catalogue, policy: Policy,
        secret: FleetSecret | None = None,
    ) -> None:  # fmt: skip
        self._bus = bus
        self._sources = sources
        self._mirror = mirror
        self._catalogue = catalogue
        self._policy = policy
        self._secret = secret
        self._base: ServedModel | None = None
        self._busy: set[str] = set()
        self._outcomes: dict[str, Outcome] = {}
        self._registrations: dict[str, Registration] = {}
        self._reload_at_s = 0.0  # monotonic

    def set_base(self, base: ServedModel) -> None:
        """Say what adapters must fit; everything is looked at again when it has changed."""
        if self._base is None or self._base.fingerprint != base.fingerprint:
            self._outcomes.clear()
        self._base = base

    async def tick(self, tasks: asyncio.TaskGroup, refresh_s: float, *, reload: bool) -> None:
        """Start in `tasks` what is due; wait for none of it. Names are looked up again every `refresh_s`.

        `reload` says that registrations may have changed; now and then they are read again anyway.
        """
        await self._renew_leases()
        if reload or time.monotonic() >= self._reload_at_s:
            await self._reload()
        for field, registration in self._registrations.items():
            if field not in self._busy and self._is_due(field, registration):
                self._busy.add(field)
                tasks.create_task(self._take(field, registration, refresh_s))

    async def _reload(self) -> None:
        """Read the registrations; remove the names that have none any more, and what nobody has asked for again."""
        self._reload_at_s = time.monotonic() + RELOAD_S
        self._registrations = await self._bus.adapters.registrations()
        for field in self._stale_requests():
            registration = self._registrations.pop(field)
            await self._bus.adapters.unregister(
                registration.name, registration.tenant, unless_asked_after=registration.asked_ms
            )
        for field, alias in list(self._catalogue.aliases.items()):
            if field not in self._registrations and not alias.is_folder:
                self._outcomes.pop(field, None)
                await self._catalogue.remove(field)

    def _stale_requests(self) -> list[str]:
        """Return the names from requests that nobody has asked for in a while, or that are too many."""
        now = now_ms()
        stale: list[str] = []
        kept: list[tuple[int, str]] = []
        for field, registration in self._registrations.items():
            if registration.on_request:
                outcome = self._outcomes.get(field)
                forget_ms = FORGET_REFUSED_MS if outcome is not None and outcome.num_failures else FORGET_UNUSED_MS
                if registration.asked_ms < now - forget_ms:
                    stale.append(field)
                else:
                    kept.append((registration.asked_ms, field))
        return stale + [field for _, field in sorted(kept)[: max(0, len(kept) - MAX_ON_REQUEST)]]

    def _is_due(self, field: str, registration: Registration) -> bool:
        alias = self._catalogue.aliases.get(field)
        if alias is not None and alias.is_folder and registration.source != alias.source:
            return False  # a folder of that name comes first
        outcome = self._outcomes.get(field)
        if outcome is None and alias is not None and alias.state == "failed" and registration.on_request:
            # Another store has tried, or this one before its restart.
            return registration.asked_ms > alias.asked_ms and now_ms() >= alias.retry_ms
        if outcome is None or (outcome.registration.source, outcome.registration.token) != (
            registration.source, registration.token,
        ):  # fmt: skip
            return True
        if alias is None and not outcome.num_failures:
            return True
        rested = time.monotonic() >= outcome.ended_s + outcome.pause_s
        if registration.asked_ms > outcome.registration.asked_ms:
            # Who registers a name again wants it looked at now; requests for a bad one, however many, wait.
            return rested or not (registration.on_request and outcome.num_failures)
        return rested and not registration.on_request and not outcome.refused

    async def _renew_leases(self) -> None:
        await self._bus.adapters.renew_leases(self._busy, LEASE_MS)

    def token_for(self, digest: str) -> str:
        """Return a token with which some registration has reached this content."""
        for field, alias in self._catalogue.aliases.items():
            registration = self._registrations.get(field)
            if alias.digest == digest and registration is not None and registration.token:
                return self._token(field, registration)
        return ""

    def _token(self, field: str, registration: Registration) -> str:
        """Return a registration's token. Raises PermissionDenied when it cannot be read here."""
        if registration.token and self._secret is None:
            raise PermissionDenied("this store has no secret to read the token with")
        return self._secret.open(registration.token, field) if self._secret is not None else ""

    # ------------------------------------------------------------ one name

    async def _take(self, field: str, registration: Registration, refresh_s: float) -> None:
        """Bring one name up to date, unless another store does; what goes wrong concerns this name only."""
        try:
            if not await self._bus.adapters.take_lease(field, LEASE_MS):
                return
            try:
                await self._bring(field, registration, refresh_s)
            finally:
                await self._bus.adapters.release_lease(field)
        except QueueError as error:
            logger.warning("adapter %s is taken up again: %s", registration.name, error)
        except Exception:
            logger.exception("adapter %s cannot be brought", registration.name)
            self._note_failure(field, registration, refused=False)
        finally:
            self._busy.discard(field)

    async def _bring(self, field: str, registration: Registration, refresh_s: float) -> None:
        alias = Alias(
            name=registration.name, tenant=registration.tenant, state="downloading", source=registration.source,
            registered=registration.source, asked_ms=registration.asked_ms, on_request=registration.on_request,
        )  # fmt: skip
        await self._catalogue.announce([alias])
        base = self._base
        try:
            reference, source = self._place(registration)
            target = reference.source.partition(":")[2]
            taken = await self._mirror.take(source, target, base, self._token(field, registration))
            if base is None:
                return  # due until the base is known
            record = await self._mirror.describe(taken.digest, taken.version.source, base)
        except (LorafleetError, OSError, Changed) as error:
            await self._fail(alias, registration, error)
            return
        # What a commit holds never changes; whether a token may still read it does.
        pause_s = math.inf if reference.is_fixed and not registration.token else refresh_s
        self._outcomes[field] = Outcome(registration, time.monotonic(), pause_s)
        if field in self._registrations:
            served = msgspec.structs.replace(alias, state="on_disk", digest=taken.digest, source=taken.version.source)
            await self._catalogue.publish(served, record)
            logger.info("adapter %s is served: %.12s of %s", registration.name, taken.digest, taken.version.source)

    def _place(self, registration: Registration) -> tuple[Reference, Source]:
        """Return where to fetch from. Raises BadRequest, PermissionDenied."""
        reference = parse_source(registration.source)
        source = self._sources.get(reference.scheme) if reference else None
        if reference is None or source is None:
            raise BadRequest(f"{registration.source!r} is not a place adapters can be fetched from")
        self._policy.check(reference, on_request=registration.on_request)
        return reference, source

    async def _fail(self, alias: Alias, registration: Registration, error: LorafleetError | OSError | Changed) -> None:
        field = field_of(alias)
        if isinstance(error, LorafleetError):
            reason, status = error.message, error.status
        else:
            reason, status = str(error.strerror if isinstance(error, OSError) else error), 503
        logger.warning("adapter %s: %s", registration.name, reason)
        refused = isinstance(error, ClientError)
        pause_s = self._note_failure(field, registration, refused=refused)
        if field not in self._registrations or await self._serve_on(
            field, registration, reason, status, refused=refused
        ):
            return
        await self._catalogue.publish(
            msgspec.structs.replace(
                alias, state="failed", reason=reason, status=status, retry_ms=now_ms() + int(1000 * pause_s)
            )
        )

    async def _serve_on(
        self, field: str, registration: Registration, reason: str, status: int, *, refused: bool
    ) -> bool:
        """Go on serving what the name stood for, and say why it is not newer; False if there is nothing to serve.

        What its own source refuses is not served on; what a name was to be pointed to instead is no reason to stop.
        """
        known = self._catalogue.aliases.get(field)
        if known is None or known.state != "on_disk" or self._base is None:
            return False
        moving = known.registered != registration.source
        if refused and not moving:
            return False
        try:
            record = await self._mirror.describe(known.digest, known.source, self._base)
        except (AdapterRefused, Changed):
            return False
        said = f"not {registration.source}: {reason}" if moving else f"may be out of date: {reason}"
        served = msgspec.structs.replace(known, reason=said, status=status, asked_ms=registration.asked_ms)
        await self._catalogue.publish(served, record)
        return True

    def _note_failure(self, field: str, registration: Registration, *, refused: bool) -> float:
        """Return the pause before the next try, s."""
        last = self._outcomes.get(field)
        failures = 1 + (last.num_failures if last is not None and last.refused == refused else 0)
        # Refused: tried again when somebody asks, but not before. In trouble: by itself.
        pause_s = (REFUSAL if refused else TROUBLE).pause_s(failures)
        self._outcomes[field] = Outcome(registration, time.monotonic(), pause_s, failures, refused)
        return pause_s
