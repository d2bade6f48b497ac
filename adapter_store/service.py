"""The store as a process: HTTP for workers, the adapter folder into the catalogue, beats. All awaits are here."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from pathlib import Path

from adapter_store.blobs import Blobs
from adapter_store.catalogue import Catalogue
from adapter_store.follow import Follower
from adapter_store.http import BlobServer
from adapter_store.mirror import Mirror
from adapter_store.sources import Changed, Source
from adapter_store.sources.local import LocalSource
from protocol.bus import CONNECTION_ERRORS, Bus, now_ms
from protocol.errors import LorafleetError
from protocol.messages import ServedModel
from protocol.service import wait_any
from protocol.settings import Settings

logger = logging.getLogger(__name__)

BEAT_S = 1.0
BEAT_TTL_MS = 5000
FORGET_MS = 60_000
"""Silence after which another store is struck off the register."""


async def serve(settings: Settings, stop: asyncio.Event) -> int:
    """Run a store until `stop`; return the process' exit code."""
    bus = Bus(settings.redis_url)
    try:
        if await _reach(bus, stop):
            await Store(bus, settings, await asyncio.to_thread(_open_blobs, settings)).run(stop)
        return 0
    finally:
        await bus.close()


def _open_blobs(settings: Settings) -> Blobs:
    return Blobs(settings.data / "adapters", settings.store_quota_bytes)


async def _reach(bus: Bus, stop: asyncio.Event) -> bool:
    """Wait for Redis; False when `stop` came first."""
    while not stop.is_set():
        try:
            await bus.check()
        except CONNECTION_ERRORS as error:
            logger.warning("Redis cannot be reached: %s", error)
            await wait_any(stop, BEAT_S)
        else:
            return True
    return False


class Store:
    """One store."""

    def __init__(self, bus: Bus, settings: Settings, blobs: Blobs) -> None:
        self.bus = bus
        self.settings = settings
        self.sid = f"{socket.gethostname()}-{secrets.token_hex(4)}"
        self.blobs = blobs
        self.mirror = Mirror(blobs, max_bytes=settings.max_adapter_bytes)
        self.catalogue = Catalogue(bus, self.sid)
        self.server = BlobServer(self.locate, self.health)
        self.base: ServedModel | None = None
        self.sources: dict[str, Source] = {}
        if settings.adapters is not None:
            self.sources["local"] = LocalSource(settings.adapters)

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop`; what is being fetched then is left for the next start."""
        port = await self.server.start(self.settings.store_host, self.settings.store_port)
        url = self.settings.store_url or f"http://{_reachable(self.settings.store_host)}:{port}"
        try:
            async with asyncio.TaskGroup() as tasks:
                work = tasks.create_task(self._work(url, stop))
                await stop.wait()
                work.cancel()
        finally:
            await self.server.close()
            await self._leave()

    async def _work(self, url: str, stop: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._beat(url, stop))
            tasks.create_task(self._follow(tasks, stop))
            logger.info("adapter store ready at %s: %d adapters on disk", url, len(self.blobs))

    def health(self) -> dict[str, object]:
        """Return what `/health` says."""
        return {
            "status": "ok",
            "sid": self.sid,
            "base": self.base.name if self.base else None,
            "num_names": len(self.catalogue.aliases),
            "num_blobs": len(self.blobs),
            "num_bytes": self.blobs.num_bytes,
        }

    # ------------------------------------------------------------ loops

    async def _beat(self, url: str, stop: asyncio.Event) -> None:
        keys = self.bus.keys
        while not stop.is_set():
            try:
                await self.bus.beat(keys.store_beat(self.sid), keys.stores, self.sid, url.encode(), BEAT_TTL_MS)
                await self.bus.redis.zremrangebyscore(keys.stores, "-inf", now_ms() - FORGET_MS)
            except CONNECTION_ERRORS as error:
                logger.warning("cannot beat: %s", error)
            await wait_any(stop, BEAT_S)

    async def _follow(self, tasks: asyncio.TaskGroup, stop: asyncio.Event) -> None:
        """Follow base model and adapter folder."""
        follower: Follower | None = None
        while not stop.is_set():
            try:
                if follower is None:
                    await self.catalogue.load()
                    follower = self._follower()
                self.base = await self.bus.get(self.bus.keys.base, ServedModel) or self.base
                if follower is not None:
                    if self.base is not None:
                        follower.set_base(self.base)
                    await follower.tick(tasks)
                await self.catalogue.repair()
            except CONNECTION_ERRORS as error:
                logger.warning("cannot keep the catalogue: %s", error)
            await wait_any(stop, self.settings.scan_interval_s)

    def _follower(self) -> Follower | None:
        source = self.sources.get("local")
        if not isinstance(source, LocalSource):
            return None
        return Follower(source, self.mirror, self.catalogue, settle_s=self.settings.scan_interval_s)

    async def _leave(self) -> None:
        keys = self.bus.keys
        try:
            await self.bus.redis.delete(keys.store_beat(self.sid))
            await self.bus.redis.zrem(keys.stores, self.sid)
        except CONNECTION_ERRORS:
            logger.info("Redis is gone: the store's beat will expire by itself")

    # ------------------------------------------------------------ blobs on request

    async def locate(self, digest: str) -> Path | None:
        """Return the folder of a digest, its content verified; bring it from its source again if it left the disk.

        None when it is unknown. Raises the source's errors.
        """
        folder = await asyncio.to_thread(self.blobs.verified, digest)
        if folder is not None:
            return folder
        record = await self.catalogue.record(digest)
        if record is None:
            return None
        scheme, _, target = record.source.partition(":")
        source = self.sources.get(scheme)
        if source is None:
            return None
        try:
            taken = await self.mirror.take(source, target, self.base)
        except Changed as error:
            logger.warning("adapter %.12s is not at %s any more: %s", digest, record.source, error)
            return None
        except OSError as error:
            raise LorafleetError(f"the source cannot be read: {error.strerror}") from error
        return await asyncio.to_thread(self.blobs.verified, digest) if taken.digest == digest else None


def _reachable(host: str) -> str:
    """Return an address for others to reach a listener on `host`."""
    return socket.gethostbyname(socket.gethostname()) if host in ("", "0.0.0.0", "::") else host
