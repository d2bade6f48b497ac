"""Keeps the catalogue in agreement with the local adapter folder.

A complete adapter that fits the base model is served; for any other the catalogue has the reason.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from adapter_store.bases import Bases
from adapter_store.catalogue import Catalogue
from adapter_store.mirror import Mirror
from adapter_store.sources import FLEET, Changed
from adapter_store.sources.local import LocalSource
from adapter_store.watch import Watch
from protocol.queue.bus import QueueError
from protocol.runtime.adapter_refs import FOLDER
from protocol.wire.errors import ClientError, LorafleetError
from protocol.wire.messages import Alias

logger = logging.getLogger(__name__)

FIRST_RETRY_S = 1.0
MAX_RETRY_S = 60.0
MAX_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class NextTry:
    """When to retry a name that failed for a temporary reason."""

    at_s: float  # monotonic time
    pause_s: float


class Follower:
    """Follows the changes of one local source."""

    def __init__(self, source: LocalSource, mirror: Mirror, catalogue: Catalogue, settle_s: float) -> None:
        """Start without a scan. A folder is complete once nothing in it has changed for `settle_s` seconds."""
        self._source = source
        self._mirror = mirror
        self._catalogue = catalogue
        known = [alias.name for alias in catalogue.aliases.values() if alias.is_folder]
        self._watch = Watch(int(settle_s * 1e9), known)
        self._bases = Bases()
        self._busy: set[str] = set()
        self._slots = asyncio.Semaphore(MAX_AT_ONCE)
        self._retries: dict[str, NextTry] = {}
        self._root_error = ""

    def set_bases(self, bases: Bases) -> None:
        """Set the changed bases that adapters must fit: all folders are checked again."""
        self._bases = bases
        self._watch.recheck_all()

    async def tick(self, tasks: asyncio.TaskGroup) -> None:
        """Scan once, and start the work on each changed adapter in `tasks` without waiting for it."""
        try:
            seen = await asyncio.to_thread(self._source.scan)
        except OSError as error:
            self._log_root_error(error)
            return
        self._root_error = ""
        for name, retry in list(self._retries.items()):
            if retry.at_s <= time.monotonic():
                self._watch.recheck(name)
        changes = self._watch.observe(seen, time.time_ns())
        await self._catalogue.announce(
            [
                Alias(name=name, state="downloading", source=f"local:{name}")
                for name in changes.appeared
                if FOLDER.fullmatch(name)
            ]
        )
        for name in changes.removed:
            self._retries.pop(name, None)
            logger.info("adapter %s was removed", name)
            await self._catalogue.remove(name)
        for name in changes.settled:
            if FOLDER.fullmatch(name) is None:
                logger.warning("the folder %.200r is not served: its name is not a valid adapter name", name)
            elif name in self._busy:
                self._watch.recheck(name)  # after the work in progress
            else:
                self._busy.add(name)
                tasks.create_task(self._update(name))

    def _log_root_error(self, error: OSError) -> None:
        """Log an error once. An unreadable root, such as a lost mount, does not remove adapters."""
        if str(error) != self._root_error:
            logger.error("cannot read the adapter folder: %s", error)
        self._root_error = str(error)

    async def _update(self, name: str) -> None:
        """Bring one folder into the blobs and publish the outcome; an error affects only this name."""
        try:
            try:
                # A conversion takes minutes, so no slot is held while waiting for one.
                await self._mirror.converted(lambda: self._mirror_and_publish(name))
            except (LorafleetError, OSError) as error:
                await self._fail(name, error)
        except (Changed, QueueError) as error:
            logger.info("adapter %s is being re-read: %s", name, error or "it was changed meanwhile")
            self._watch.recheck(name)
        except asyncio.CancelledError:
            raise
        except BaseException:  # including panics of Rust libraries
            logger.exception("adapter %s cannot be read", name)
            self._retry_later(name)
        finally:
            self._busy.discard(name)

    async def _mirror_and_publish(self, name: str) -> None:
        async with self._slots:
            mirrored, base, record = await self._bases.take(self._mirror, self._source, name, "", FLEET)
            if record is None:
                return  # `set_bases` triggers another check; until then the name stays "downloading"
            self._retries.pop(name, None)
            if name not in self._watch:
                return
            alias = Alias(name=name, state="on_disk", digest=mirrored.digest, source=mirrored.version.source, base=base)
            await self._catalogue.publish(alias, record)
            logger.info("adapter %s is served: %.12s, rank %d", name, mirrored.digest, record.rank)

    async def _fail(self, name: str, error: LorafleetError | OSError) -> None:
        if isinstance(error, LorafleetError):
            reason, status = error.message, error.status
        else:
            reason, status = f"{error.strerror or error}", 503  # without the path, which clients must not see
        if isinstance(error, ClientError):
            self._retries.pop(name, None)  # only a change of its files can help
        else:
            self._retry_later(name)
        logger.warning("adapter %s is not served: %s", name, reason)
        if name in self._watch:
            failed = Alias(name=name, state="failed", source=f"local:{name}", reason=reason, status=status)
            await self._catalogue.publish(failed)

    def _retry_later(self, name: str) -> None:
        last = self._retries.get(name)
        pause_s = min(2 * last.pause_s, MAX_RETRY_S) if last else FIRST_RETRY_S
        self._retries[name] = NextTry(time.monotonic() + pause_s, pause_s)
