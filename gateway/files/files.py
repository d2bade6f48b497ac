"""Operations of clients on files: upload, list, read, delete. Contents are in the storage, records in the queue."""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import msgspec

from gateway.auth.callers import Caller
from gateway.files.storage import Storage
from gateway.files.upload import UploadedForm
from gateway.http.list_page import list_page
from gateway.overload import reads
from gateway.overload.shares import shares
from protocol.queue.bus import CONNECTION_ERRORS, Bus, now_ms
from protocol.runtime.backoff import Backoff
from protocol.runtime.fair_slots import FairSlots
from protocol.runtime.guarded import Items
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.brief import brief
from protocol.wire.errors import BadRequest, LorafleetError, NotFound, Overloaded, Unavailable, UnreadableRecord

logger = logging.getLogger(__name__)

ID_PREFIX = "file-"
PURPOSES = ("batch",)
"""Allowed purposes of uploads: only batches read uploaded files."""

OUTPUT_PURPOSE = "batch_output"


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """Limits of concurrent uploads per gateway, and their minimum speed while others wait.

    Without it, four tenants could block all slots for days, at the 8 kB/s allowed for any body.
    """

    num: int = 16
    num_of_tenant: int = 4
    num_waiting: int = 64
    slow_bytes_per_s: int = 128 << 10  # a slower upload is ended in favor of a waiting one,
    slow_after_s: float = 30.0  # after this many seconds


HELD_S = 86_400.0
"""Seconds for which space is reserved for an upload; a slower one is aborted."""

HELD_AHEAD_BYTES = 4 << 20
"""Bytes reserved at a time for a file of unknown length."""

FORM_BYTES = 64 << 10
"""Maximum bytes of an upload besides its file: the multipart form."""

MAX_WITHOUT_BYTES = 10_000
"""Maximum records, per gateway, that it remembers to delete later."""

MIN_LIFE_S, MAX_LIFE_S = 3600, 30 * 86_400
"""Range of lifetimes that clients may request, as in OpenAI's API."""

SWEEP_S = 60.0
"""Seconds between searches for expired files."""

TIDY_S = 3600.0
"""Mean seconds between searches for abandoned partial files: each scans the whole storage."""

_EXPIRY = ("expires_after[anchor]", "expires_after[seconds]")

_AT_ONCE = 100  # records of a list read together
_SWEPT_AT_ONCE, _SWEPT_OF_TENANT = 1000, 16  # expired files read together, and deleted per tenant


class FileService:
    """The files of the fleet."""

    def __init__(self, bus: Bus, storage: Storage, settings: Settings, limits: UploadLimits | None = None) -> None:
        self._bus = bus
        self._limits = limits = limits or UploadLimits()
        self._storage = storage
        self._settings = settings
        self._without_bytes: dict[str, str] = {}  # file id -> tenant, for records still to be deleted
        self._uploads = FairSlots(limits.num, limits.num_of_tenant, limits.num_waiting)
        self._ending: set[str] = set()  # ids of slow uploads that are being ended
        # Unlimited tries: an expired file's content must be deleted once the storage is back.
        self._expiring = Items("expired files", max_tries=0, backoff=Backoff(1.0, 3600.0))

    # ------------------------------------------------------------ making

    async def upload(self, form: UploadedForm, body: AsyncIterator[bytes], caller: Caller, length: int) -> m.File:
        """Store an uploaded file. Raises BadRequest, TooLarge, Overloaded, NoRoom, Unavailable.

        length: Content-Length of the body, 0 if unknown: this much space must be free before it is read.
        """
        async with self._uploads.held(caller.owner):
            await self._storage.check_room(length)
            now = now_ms()
            file = m.File(
                id=new_id(),
                tenant=caller.owner,
                filename="",
                purpose="",
                created_ms=now,
                expires_ms=now + int(HELD_S * 1000),
                num_bytes=max(0, length - FORM_BYTES),
            )
            try:
                return await self._receive(file, form, body)
            finally:
                self._ending.discard(file.id)

    async def _receive(self, file: m.File, form: UploadedForm, body: AsyncIterator[bytes]) -> m.File:
        """Write an upload's content, then its record.

        Space is reserved first, so that an interrupted upload is found and deleted later, also if this process dies or
        the reply about the record, which then may exist, is lost.
        """
        settings = self._settings
        await self._hold(file, file.num_bytes, 0)
        try:
            async with asyncio.timeout(HELD_S - SWEEP_S):
                chunks = self._held(file, form.chunks(body, _check_fields))
                num_bytes = await self._storage.write(place_of(file.id), chunks)
            fields = {"purpose": "", **form.fields}
            _check_fields(fields)
            life_s = _life_s(fields, settings.file_ttl_s)
        except BaseException:
            await self._give_up(file)
            raise
        kept = _with_life(file, form.filename, fields["purpose"], num_bytes, life_s)
        limits = {"max_bytes": settings.tenant_file_bytes, "max_files": settings.tenant_files}
        outcome, num = await self._bus.files.keep(kept, **limits)
        if outcome != "ok":
            await self._give_up(file)
            raise self._refusal(outcome, num, num_bytes)
        return kept

    async def _held(self, file: m.File, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Pass on a file's chunks; reserve more space before exceeding the reservation. Raises Overloaded."""
        come, held, began_s = 0, file.num_bytes, time.monotonic()
        async for chunk in chunks:
            come += len(chunk)
            lasts_s, least = time.monotonic() - began_s, self._limits.slow_bytes_per_s
            is_slow = lasts_s >= self._limits.slow_after_s and come < least * lasts_s
            if is_slow and self._uploads.num_kept_waiting > len(self._ending):  # end one per waiting upload
                self._ending.add(file.id)
                raise Overloaded(
                    f"other uploads are waiting, and this one arrives at {int(come / max(lasts_s, 1.0))} bytes/s;"
                    f" the minimum is then {least} bytes/s",
                    60.0,
                )
            if come > held:
                held = await self._hold(file, come, HELD_AHEAD_BYTES)
            yield chunk

    async def _hold(self, file: m.File, num_bytes: int, ahead: int) -> int:
        """Reserve `num_bytes` in the tenant's quota, and `ahead` more if possible. Return the reserved bytes.

        Raises Overloaded.
        """
        settings = self._settings
        for wanted in (num_bytes + ahead, num_bytes):
            outcome, num = await self._bus.files.hold(
                msgspec.structs.replace(file, num_bytes=wanted),
                max_bytes=settings.tenant_file_bytes,
                max_files=settings.tenant_files,
            )
            if outcome == "ok":
                return wanted
        raise self._refusal(outcome, num, num_bytes)

    def _refusal(self, outcome: str, num: int, num_bytes: int) -> Overloaded:
        """Return the error for a file that exceeds its tenant's quota. num: the tenant's current bytes or files."""
        if outcome == "bytes":
            limit = self._settings.tenant_file_bytes
            text = f"your files have {num} bytes, and this one adds {num_bytes}; the limit is {limit}: delete some"
        else:
            text = f"you have {num} files; the limit is {self._settings.tenant_files}: delete some"
        return Overloaded(text, 60.0)

    async def _give_up(self, file: m.File) -> None:
        """Delete an upload's partial data and reservation; if that fails, the reservation's expiry deletes them."""
        try:
            await self._storage.delete(place_of(file.id))
            await self._bus.files.forget(file.id, file.tenant)
        except (LorafleetError, *CONNECTION_ERRORS) as error:
            logger.warning("partial data of %s will be deleted later: %s", file.id, error)

    async def hold_output(self, file_id: str, tenant: str, num_bytes: int, until_ms: int) -> None:
        """Reserve space for a growing output file until `until_ms` or `make`. Raises Overloaded.

        It counts against the tenant's quota. If it is not made in time, its data are deleted by its id.
        """
        file = _of_output(file_id, tenant, "", num_bytes, now_ms(), until_ms)
        await self._hold(file, num_bytes, 0)

    async def make(
        self, file_id: str, tenant: str, filename: str, chunks: AsyncIterator[bytes | bytearray], life_s: float
    ) -> m.File | None:
        """Write an output file with the given id; return None if it is empty. Raises Unavailable.

        The tenant's quota was checked by `hold_output`, and is not checked again.
        """
        num_bytes = await self._storage.write(place_of(file_id), chunks)
        if not num_bytes:
            await self._storage.delete(place_of(file_id))
            await self._bus.files.forget(file_id, tenant)
            return None
        created_ms = now_ms()
        file = _of_output(file_id, tenant, filename, num_bytes, created_ms, created_ms + int(life_s * 1000))
        await self._bus.files.keep(file, max_bytes=0, max_files=0)
        return file

    # ------------------------------------------------------------ reading and deleting

    async def get(self, file_id: str, caller: Caller) -> m.File:
        """Return a file. Raises NotFound."""
        file = await self._bus.files.get(file_id, caller.owner)
        if file is None:
            raise NotFound(f"there is no file {brief(file_id)}", param="id", code="file_not_found")
        return file

    def read(self, file: m.File, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """Yield a file's bytes. Raises NotFound, Unavailable."""
        return self._storage.read(place_of(file.id), start, end)

    async def delete(self, file_id: str, caller: Caller) -> None:
        """Delete a file, also one whose record is unreadable: first its content, even if the queue cannot write.

        If the queue cannot write, for example because its disk is full, the record is deleted later. Raises NotFound,
        Unavailable.
        """
        with suppress(UnreadableRecord):  # it belongs to the caller, see `Files.get`
            await self.get(file_id, caller)
        await self._storage.delete(place_of(file_id))
        try:
            await self._bus.files.forget(file_id, caller.owner)
        except CONNECTION_ERRORS as error:
            if len(self._without_bytes) < MAX_WITHOUT_BYTES:
                self._without_bytes[file_id] = caller.owner
            text = "the file's content is deleted; its record follows once the queue accepts writes"
            raise Unavailable(text, code="queue_unavailable") from error

    async def list(
        self, caller: Caller, purpose: str | None, limit: int, after: str | None, *, oldest_first: bool
    ) -> dict[str, Any]:
        """Return a page of the caller's files. Raises NotFound when `after` is unknown."""
        files, start = self._bus.files, 0
        if after is not None:
            rank = await files.rank(caller.owner, after, oldest_first=oldest_first)
            if rank is None:
                raise NotFound(f"there is no file {brief(after)}", param="after")
            start = rank + 1
        page: list[dict[str, Any]] = []
        while len(page) <= limit:  # one extra tells whether there are more
            ids = await files.ids(caller.owner, start, _AT_ONCE, oldest_first=oldest_first)
            if not ids:
                break
            start += len(ids)
            reads.owe(len(ids) / reads.FILES_PER_READ)
            page += [view(file) for file in await files.get_many(ids) if purpose in (None, file.purpose)]
        return list_page(page[:limit], has_more=len(page) > limit)

    # ------------------------------------------------------------ expiry

    async def sweep(self) -> None:
        """Delete expired files and, at times, abandoned partial files."""
        await self.delete_expired()
        if random.random() < SWEEP_S / TIDY_S:  # randomized, so that gateways do not all scan at once
            await self._storage.tidy()

    async def delete_expired(self) -> None:
        """Delete expired files, round-robin by tenant, and records whose deletion the queue refused earlier.

        Failed deletions are retried with growing pauses, without limit.
        """
        files = self._bus.files
        for file_id, tenant in list(self._without_bytes.items()):
            await files.forget(file_id, tenant)
            del self._without_bytes[file_id]
        while expired := await files.expired(now_ms(), _SWEPT_AT_ONCE):
            now, later = shares(expired, itemgetter(0), _SWEPT_OF_TENANT)
            await files.put_off(later, now_ms())  # to the end of the list
            for tenant, file_id in now:
                pause_s = await self._expiring.run(file_id, partial(self._delete, file_id, tenant))
                if pause_s:
                    await files.put_off([(tenant, file_id)], now_ms() + int(1000 * pause_s) + 1)

    async def _delete(self, file_id: str, tenant: str) -> None:
        await self._storage.delete(place_of(file_id))
        await self._bus.files.forget(file_id, tenant)


def new_id() -> str:
    """Return a new file's id."""
    return ID_PREFIX + secrets.token_hex(12)


def place_of(file_id: str) -> str:
    """Return the storage name of a file's content."""
    return f"files/{file_id}"


def _with_life(file: m.File, filename: str, purpose: str, num_bytes: int, life_s: float) -> m.File:
    """Return the record of a completed upload."""
    created_ms = now_ms()
    return msgspec.structs.replace(
        file,
        filename=filename,
        purpose=purpose,
        num_bytes=num_bytes,
        created_ms=created_ms,
        expires_ms=created_ms + int(life_s * 1000),
    )


def _of_output(file_id: str, tenant: str, filename: str, num_bytes: int, created_ms: int, expires_ms: int) -> m.File:
    return m.File(
        id=file_id,
        tenant=tenant,
        filename=filename,
        purpose=OUTPUT_PURPOSE,
        num_bytes=num_bytes,
        created_ms=created_ms,
        expires_ms=expires_ms,
    )


def view(file: m.File) -> dict[str, Any]:
    """Return a file as OpenAI's object."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": file.created_ms // 1000,
        "expires_at": file.expires_ms // 1000,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def _check_fields(fields: Mapping[str, str]) -> None:
    """Refuse invalid fields of a form, which may be incomplete. Raises BadRequest."""
    for name in fields:
        if name not in ("purpose", *_EXPIRY):
            raise BadRequest(f"unknown field of the form: {brief(name)}", param=name)
    purpose = fields.get("purpose")
    if purpose is not None and purpose not in PURPOSES:
        raise BadRequest(f"purpose is {brief(purpose)}; supported purposes: {', '.join(PURPOSES)}", param="purpose")


def _life_s(fields: Mapping[str, str], default_s: float) -> float:
    """Return the lifetime, in seconds, of a form's `expires_after`. Raises BadRequest."""
    anchor, given = (fields.get(name) for name in _EXPIRY)
    if anchor is None and given is None:
        return default_s
    if anchor != "created_at":
        raise BadRequest(f"expires_after[anchor] is {brief(anchor)}; it must be created_at", param="expires_after")
    if given is None or not given.isdecimal() or not MIN_LIFE_S <= int(given[:12]) <= MAX_LIFE_S:
        text = f"expires_after[seconds] is {brief(given)}; it must be from {MIN_LIFE_S} to {MAX_LIFE_S}"
        raise BadRequest(text, param="expires_after")
    return min(float(given), default_s)
