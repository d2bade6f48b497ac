"""The dead-letter stream: requests that were given up, and messages that could not be decoded."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import msgspec

from protocol.queue import signatures as lua
from protocol.queue.connection.redis_client import Client
from protocol.queue.scripts import Scripts
from protocol.wire import messages as m
from protocol.wire.clock import now_ms
from protocol.wire.codec import decode
from protocol.wire.errors import BadRequest, Conflict, NotFound, ProtocolError
from protocol.wire.keys import Keys

logger = logging.getLogger(__name__)

KEPT_S = 604_800
"""Retention of a letter."""

MAX_LETTERS = 1024
"""Maximum number of letters; the oldest are dropped. A request's letter has one to two kB."""

MAX_RAW_BYTES = 32 << 10
"""Maximum stored bytes of an unreadable message; all letters together then have at most 32 MiB."""

_ID = re.compile(r"[0-9]{1,18}-[0-9]{1,18}")


async def set_aside(
    scripts: Scripts, keys: Keys, place: str, raw: bytes, reason: str, *taken: Sequence[str | bytes | int]
) -> None:
    """Store an unusable message as a dead letter, within `MAX_LETTERS` and `MAX_RAW_BYTES`.

    place: key where it was found. taken: commands that remove it from there, run in the same script.
    """
    logger.error("%s becomes a dead letter: %s", place, reason)
    letter = m.DeadLetter(reason=reason, stream=place, raw=raw[:MAX_RAW_BYTES], ms=now_ms())
    oldest = now_ms() - KEPT_S * 1000
    await scripts.write_vital(
        *taken,
        ("XADD", keys.dlq, "MINID", "~", oldest, "*", "b", m.encode(letter)),
        ("XTRIM", keys.dlq, "MAXLEN", MAX_LETTERS),
        ("EXPIRE", keys.dlq, KEPT_S),
    )


async def names_in(scripts: Scripts, keys: Keys, register: str, members: Sequence[bytes], num_parts: int) -> list[str]:
    """Return the members of a sorted set, names of so many parts with colons between; what is none is put aside."""
    names: list[str] = []
    for member in members:
        name = member.decode(errors="replace")
        if len(parts := name.split(":")) == num_parts and all(parts) and "\ufffd" not in name:
            names.append(name)
        else:
            await set_aside(scripts, keys, register, member, "it is no name", ("ZREM", register, member))
    return names


class DeadLetters:
    """The dead letters of a fleet; a letter's id is that of its stream entry."""

    def __init__(self, client: Client, keys: Keys, scripts: Scripts) -> None:
        self._redis = client
        self._keys = keys
        self._scripts = scripts

    async def count(self) -> int:
        """Return the number of letters."""
        return await self._redis.xlen(self._keys.dlq)

    async def newest(self, limit: int, before: str = "") -> list[tuple[str, m.DeadLetter]]:
        """Return at most `limit` letters, newest first. before: only letters older than this id. Raises BadRequest."""
        if before:
            _check_id(before)
        entries = await self._redis.xrevrange(self._keys.dlq, f"({before}" if before else "+", "-", count=limit)
        return [(entry.decode(), _read(fields)) for entry, fields in entries]

    async def get(self, letter_id: str) -> m.DeadLetter:
        """Return one letter. Raises NotFound, or BadRequest for an id of the wrong form."""
        _check_id(letter_id)
        entries = await self._redis.xrange(self._keys.dlq, letter_id, letter_id)
        if not entries:
            gone = f"it was retried, is older than 7 days, or {MAX_LETTERS} newer ones replaced it"
            raise NotFound(f"there is no dead letter {letter_id}: {gone}")
        return _read(entries[0][1])

    async def retry(self, letter_id: str, timeout_s: float) -> str:
        """Queue a letter's request again, with its attempts reset and a deadline in `timeout_s`. Returns its id.

        It continues after its existing tokens, and its result is stored. Raises NotFound, or Conflict if the letter has
        no request or the request has expired.
        """
        letter = await self.get(letter_id)
        if letter.submit is None:
            raise Conflict(f"dead letter {letter_id} is a message that could not be read: there is no request to retry")
        deadline_ms = now_ms() + int(timeout_s * 1000)
        sub = msgspec.structs.replace(
            letter.submit, gateway="", stored=True, deadline_ms=deadline_ms, submitted_ms=now_ms()
        )
        call = lua.Retry(letter=letter_id, rid=sub.rid, sub=m.encode(sub), deadline_ms=deadline_ms)
        outcome = (await self._scripts.run(call)).decode()
        if outcome == "gone":
            raise NotFound(f"there is no dead letter {letter_id}: it was retried meanwhile")
        if outcome == "expired":
            raise Conflict(f"the request {sub.rid} of dead letter {letter_id} has expired or was retried")
        return sub.rid


def _check_id(letter_id: str) -> None:
    if not _ID.fullmatch(letter_id):
        raise BadRequest(f"{letter_id!r:.100} is not a dead letter's id, which looks like 1764043172123-0")


def _read(fields: dict[bytes, bytes]) -> m.DeadLetter:
    try:
        return decode(fields[b"b"], m.DeadLetter)
    except (ProtocolError, KeyError) as error:
        return m.DeadLetter(reason=f"this letter itself cannot be read: {error!r}", raw=fields.get(b"b", b""))
