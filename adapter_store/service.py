"""The store as a process: its HTTP server, its heartbeat, and the loop that keeps the catalogue up to date."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import secrets
import socket
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from adapter_store.approximate import Approximation
from adapter_store.bases import Bases
from adapter_store.blobs import Blobs
from adapter_store.catalogue import Catalogue
from adapter_store.follow import Follower
from adapter_store.http import BlobServer
from adapter_store.mirror import Mirror
from adapter_store.pin_controller import PinController
from adapter_store.registrar import Registrar
from adapter_store.sources import FLEET, Changed, Source
from adapter_store.sources.hub import HubSource
from adapter_store.sources.local import LocalSource
from adapter_store.timings import StoreTimings
from adapter_store.uploads import Uploads
from protocol.metrics import series as metrics
from protocol.metrics.pages import serve_metrics
from protocol.queue.bus import CONNECTION_ERRORS, Bus, decode
from protocol.runtime.adapter_refs import SourcePolicy
from protocol.runtime.backoff import Backoff
from protocol.runtime.fleet_secret import FleetSecret
from protocol.runtime.free_space import Reserve
from protocol.runtime.guarded import FAILED, Items, Loop, guarded
from protocol.runtime.model_files import base_settings
from protocol.runtime.private_files import private_folder
from protocol.runtime.release import RELEASE
from protocol.runtime.settings import Settings, names_of
from protocol.wire.errors import (
    BadRequest,
    Conflict,
    LorafleetError,
    NotFound,
    PermissionDenied,
    ProtocolError,
    Unavailable,
)
from protocol.wire.messages import AdapterEvent

if TYPE_CHECKING:
    from adapter_store.shared_bucket import SharedBucket

logger = logging.getLogger(__name__)

BEAT_S = 1.0
AWAY = Backoff(0.5, 5.0)  # before a failed step is repeated
SWEEP_S = 60.0  # pause between sweeps for abandoned downloads, and uploads without a name
BEAT_TTL_MS = 5000
FORGET_MS = 60_000
"""Milliseconds without a heartbeat after which a store is unregistered."""


async def serve(settings: Settings, stop: asyncio.Event, timings: StoreTimings | None = None) -> int:
    """Run a store until `stop`; return the exit code of its process. Raises BadRequest for unusable settings."""
    secret = FleetSecret.of(settings)
    if secret is None and not _is_loopback(settings.store_host):
        raise BadRequest(
            f"store_host {settings.store_host} can be reached from other machines: give all services the same secret or"
            " secret_file, so that the store serves its own fleet only"
        )
    bus = Bus(settings.queue_url())
    try:
        if await bus.server.reach(stop):
            with serve_metrics(settings.metrics_port):
                blobs = await asyncio.to_thread(_open_blobs, settings)
                await Store(bus, settings, blobs, secret, timings).run(stop)
        return 0
    finally:
        await bus.close()


def _open_blobs(settings: Settings) -> Blobs:
    return Blobs(private_folder(settings.data / "adapters"), settings.store_quota_bytes, Reserve(settings.keep_free))


class Store:
    """One store: its parts, and the loops that drive them."""

    def __init__(
        self,
        bus: Bus,
        settings: Settings,
        blobs: Blobs,
        secret: FleetSecret | None = None,
        timings: StoreTimings | None = None,
    ) -> None:
        """Create the parts; nothing is read or fetched yet. secret: shared by the fleet's services."""
        timings = timings or StoreTimings()
        self.bus = bus
        self.settings = settings
        self.sid = f"{socket.gethostname()}-{secrets.token_hex(4)}"
        self.blobs = blobs
        reserve = blobs.reserve
        self.hub = HubSource(settings.hub_endpoint, retries=timings.retries, reserve=reserve)
        self.sources: dict[str, Source] = {"hub": self.hub}
        self.shared_bucket: SharedBucket | None = None
        if settings.s3_buckets or settings.store_bucket:
            # Imported here, because boto3 is a seventh of a store's imports, and most stores read no bucket.
            from adapter_store.shared_bucket import SharedBucket
            from adapter_store.sources.s3 import S3Source, make_client

            s3 = make_client(settings.s3_endpoint)
            self.sources["s3"] = S3Source(s3, retries=timings.retries, reserve=reserve)
            if settings.store_bucket:
                self.shared_bucket = SharedBucket(s3, settings.store_bucket)
        self.mirror = Mirror(
            blobs,
            max_bytes=settings.max_adapter_bytes,
            max_parallel=settings.max_downloads,
            shared_bucket=self.shared_bucket,
            effect_test=settings.effect_test,
            approximation=Approximation.of(settings, blobs, self.shared_bucket),
        )
        self.catalogue = Catalogue(bus, self.sid, record_kept_s=timings.record_kept_s)
        self.uploads = Uploads(settings.adapters, settings.upload_bytes, settings.max_adapter_bytes, reserve)
        self.server = BlobServer(self.locate, self.drop, self.health, secret.bearer if secret else "", self.uploads)
        self._sweep_at_s = 0.0  # monotonic time
        self._wake = asyncio.Event()  # set when a name is registered
        self._last_ids = {bus.keys.adapter_events: b"$"}  # position in the stream of events
        self._changed = False  # whether the catalogue has changed, so that registrations must be read again
        self._steps = Items("catalogue", max_tries=0, backoff=AWAY)
        names = list(base_settings(settings)) if settings.model else []
        self.bases = Bases(names)
        if settings.adapters is not None or settings.adapter_roots:
            more = [Path(path) for path in names_of(settings.adapter_roots)]
            self.sources["local"] = LocalSource(settings.adapters, more, reserve=reserve)
        self.follower: Follower | None = None  # created after the first read of the catalogue
        self.pin_controller = PinController(bus, self.catalogue, settings)
        policy = SourcePolicy.of(settings)
        self.registrar = Registrar(
            bus, self.sources, self.mirror, self.catalogue, policy, secret, timings, settings.access_check_s
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop`. Interrupted fetches resume at the next start."""
        port = await self.server.start(self.settings.store_host, self.settings.store_port)
        url = self.settings.store_url or f"http://{reachable(self.settings.store_host, self.settings.redis_url)}:{port}"
        try:
            async with asyncio.TaskGroup() as tasks:
                work = tasks.create_task(self._work(url))
                await stop.wait()
                work.cancel()
        finally:
            await self.server.close()
            await self.hub.close()
            await self._leave()

    def loops(self, url: str, tasks: asyncio.TaskGroup) -> list[Loop]:
        """Return the store's loops. url: of this store. tasks: group in which fetches run."""
        return [
            Loop("beats", partial(self._beat, url), BEAT_S, backoff=AWAY),
            Loop("adapter events", self._listen, 0.0, backoff=AWAY),
            Loop("catalogue", partial(self._keep, tasks), self.settings.scan_interval_s, self._wake, AWAY),
        ]

    async def _work(self, url: str) -> None:
        async with asyncio.TaskGroup() as tasks:
            for loop in self.loops(url, tasks):
                tasks.create_task(guarded(loop))
            logger.info("adapter store ready at %s: %d adapters on disk", url, len(self.blobs))

    def health(self) -> dict[str, object]:
        """Return the fields of `/health`."""
        return {
            "status": "ok",
            "version": RELEASE,
            "sid": self.sid,
            "base": next(iter(self.bases.names), None),
            "num_names": len(self.catalogue.aliases),
            "num_blobs": len(self.blobs),
            "num_bytes": self.blobs.num_bytes,
        }

    # ------------------------------------------------------------ loops

    async def _beat(self, url: str) -> None:
        keys = self.bus.keys
        await self.bus.members.beat(keys.store_beat(self.sid), keys.stores, self.sid, url.encode(), BEAT_TTL_MS)
        await self.bus.members.forget_stores(FORGET_MS)

    async def _keep(self, tasks: asyncio.TaskGroup) -> None:
        """Update the catalogue from the base models, the adapter folder and the registrations.

        A failed step does not prevent the others.
        """
        self._changed = await self.catalogue.load() or self._changed
        self.follower = self.follower or self._follower()
        done = self._steps.run
        await done("base model", self._set_bases)
        if self.follower is not None:
            await done("adapter folder", partial(self.follower.tick, tasks))
        await done("registrations", partial(self._tick_registrar, tasks))
        await done("pins", self.pin_controller.tick)
        await done("records", self.catalogue.sweep)
        if time.monotonic() >= self._sweep_at_s:
            self._sweep_at_s = time.monotonic() + SWEEP_S
            await done("downloads", partial(asyncio.to_thread, self.blobs.sweep))
            await done("uploads", self._sweep_uploads)
        self._measure()

    async def _tick_registrar(self, tasks: asyncio.TaskGroup) -> None:
        await self.registrar.tick(tasks, self.settings.refresh_s, reload=self._changed)
        self._changed = False

    async def _sweep_uploads(self) -> None:
        """Delete uploads that no registration has named for `uploads.KEPT_S`."""
        sources = {one.source for one in (await self.bus.adapters.registrations()).values()}
        # Includes names whose registrations only newer releases can read.
        sources |= {alias.registered for alias in self.catalogue.aliases.values()}
        await asyncio.to_thread(self.uploads.sweep, sources)

    def _measure(self) -> None:
        metrics.STORE_BLOBS.set(len(self.blobs))
        metrics.STORE_BYTES.set(self.blobs.num_bytes)
        states = Counter(alias.state for alias in self.catalogue.aliases.values())
        for state in ("downloading", "on_disk", "failed"):
            metrics.STORE_NAMES.labels(state).set(states[state])

    async def _set_bases(self) -> None:
        if self.bases.set(*await self.bus.members.bases(), await self.bus.added_bases.get()):
            self.registrar.set_bases(self.bases)
            if self.follower is not None:
                self.follower.set_bases(self.bases)

    async def _listen(self) -> None:
        """Wait for events; wake the catalogue's loop when a name is registered."""
        stream = self.bus.keys.adapter_events
        for entry, fields in (await self.bus.streams.read(self._last_ids, block_ms=1000)).get(stream, []):
            try:
                if decode(fields.get(b"b", b""), AdapterEvent).kind == "wanted":
                    self._wake.set()
            except ProtocolError as error:
                FAILED.note("adapter events", error, f"the event {entry.decode()}")

    def _follower(self) -> Follower | None:
        source = self.sources.get("local")
        if not isinstance(source, LocalSource) or source.root is None:
            return None
        return Follower(source, self.mirror, self.catalogue, settle_s=self.settings.scan_interval_s)

    async def _leave(self) -> None:
        try:
            await self.bus.members.leave_store(self.sid)
        except CONNECTION_ERRORS:
            logger.info("Redis is not responding; the store's heartbeat will expire")

    # ------------------------------------------------------------ blobs on request

    async def locate(self, digest: str) -> Path | None:
        """Return the verified folder of a digest, fetched again if it was evicted; None for an unknown digest.

        Raises the errors of its source.
        """
        folder = await asyncio.to_thread(self.blobs.verified, digest)
        if folder is None and (await self.mirror.restore(digest) or await self._fetch_again(digest)):
            folder = await asyncio.to_thread(self.blobs.verified, digest)
        return folder

    async def drop(self, digest: str) -> int:
        """Delete a digest from this disk and from the shared bucket; return the bytes freed on this disk.

        Raises Conflict while a name refers to it.
        """
        await self.catalogue.load()
        names = [alias.name for alias in self.catalogue.aliases.values() if alias.digest == digest]
        if names:
            raise Conflict(f"the name {names[0]} refers to it")
        num_bytes = await asyncio.to_thread(self.blobs.drop, digest)
        if self.shared_bucket is not None:
            await asyncio.to_thread(self.shared_bucket.drop, digest)
        return num_bytes

    async def _fetch_again(self, digest: str) -> bool:
        """Fetch a digest from its source again; return whether the source still has this content."""
        record = await self.catalogue.record(digest)
        if record is None:
            return False
        scheme, _, target = record.source.partition(":")
        source = self.sources.get(scheme)
        if source is None:
            return False
        refusal: LorafleetError | None = None
        base = next((alias.base for alias in self.catalogue.aliases.values() if alias.digest == digest), "")
        for access in self.registrar.accesses_to(digest) or [FLEET]:
            try:
                mirrored = await self.mirror.converted(
                    partial(self.mirror.take, source, target, self.bases.get(base), access)
                )
                return mirrored.digest == digest
            except Changed as error:
                logger.warning("adapter %.12s is no longer at %s: %s", digest, record.source, error)
                return False
            except OSError as error:
                raise Unavailable(f"the source cannot be read: {error.strerror}") from error
            except (PermissionDenied, NotFound) as error:
                refusal = error
        assert refusal is not None
        raise refusal


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host.startswith("127.") or host == "::1"


def reachable(host: str, queue_url: str) -> str:
    """Return the address, in URL form, at which the fleet can reach a listener on `host`.

    For a listener on all addresses, it is the one with which this machine reaches the queue: on a machine or container
    in several networks, that network is shared with the fleet.
    """
    found = host
    if host in ("", "0.0.0.0", "::"):
        # With Sentinels, the URL has several addresses separated by commas.
        queue = urlsplit(f"//{urlsplit(queue_url).netloc.rpartition('@')[2].split(',')[0]}")
        found = _address_towards(queue.hostname, queue.port or 6379) if queue.hostname else ""
        if not found or ipaddress.ip_address(found).is_loopback:
            found = socket.gethostbyname(socket.gethostname())
    return f"[{found}]" if ":" in found else found


def _address_towards(host: str, port: int) -> str:
    """Return this machine's address on the route to a host, "" without a route. No packet is sent."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return probe.getsockname()[0]
    except OSError:
        return ""
