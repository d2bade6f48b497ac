"""The actions of operators, and of tenants on their adapters: bounded lists, newest first, and a log line for each.

Operators and tenants have separate lists, so that no tenant can displace an operator's entries.
"""

from __future__ import annotations

import getpass
import logging
import re
import socket

import msgspec

from protocol.queue.connection.redis_client import CONNECTION_ERRORS, Client, QueueError
from protocol.queue.scripts import Scripts
from protocol.wire import messages as m
from protocol.wire.clock import now_ms
from protocol.wire.codec import decode
from protocol.wire.errors import BadRequest
from protocol.wire.keys import Keys

logger = logging.getLogger(__name__)

MAX_ENTRIES = 10_000
"""Maximum number of entries of each list; older ones are dropped."""

MAX_TEXT = 300
"""Maximum characters of a text in an entry."""

SCHEDULER = "scheduler"
"""The actor of the scheduler's own actions."""

CLI = "cli"
"""The actor of commands: they prove their right by the queue's password instead of an API key."""

_ID = re.compile(r"[0-9]{1,18}-[0-9]{1,18}")


class AuditEntry(m.Wire, frozen=True):
    """One action."""

    ms: int  # unix time
    who: str  # id of the API key; `CLI`; `SCHEDULER`; "" without keys
    tenant: str  # tenant of the key; for commands, user and machine
    address: str  # client address; "" for commands
    action: str  # action, such as "adapter.pin"
    target: str  # name or id of the object
    detail: str  # further parameters
    outcome: str  # "done", or the code of the error
    by_operator: bool


class AuditLog:
    """The audit log of a fleet."""

    def __init__(self, client: Client, keys: Keys, scripts: Scripts, max_entries: int = MAX_ENTRIES) -> None:
        """max_entries: maximum number of entries of each list."""
        self._max = max_entries
        self._redis = client
        self._keys = keys
        self._scripts = scripts

    async def note(self, entry: AuditEntry) -> None:
        """Add an entry, even while the server's memory is full; only to the log if the queue is unreachable.

        Names and parameters from the request are written on one line, so that none of them can forge a second entry.
        """
        entry = msgspec.structs.replace(entry, target=_on_a_line(entry.target), detail=_on_a_line(entry.detail))
        who = f"{entry.who or 'anonymous'} of {entry.tenant}" if entry.tenant else entry.who or "anonymous"
        logger.info(
            "audit: %s %s %s by %s from %s: %s", entry.action, entry.target, entry.detail,
            who, entry.address or "this machine", entry.outcome,
        )  # fmt: skip
        stream = self._keys.audit if entry.by_operator else self._keys.tenants_audit
        try:
            add = ("XADD", stream, "MAXLEN", "~", self._max, "*", "b", m.encode(entry))
            await self._scripts.write_vital(add)
        except (*CONNECTION_ERRORS, QueueError) as error:
            logger.warning("the audit log could not be written: %s", error)

    async def newest(self, limit: int, before: str = "", *, of_tenants: bool = False) -> list[tuple[str, AuditEntry]]:
        """Return at most `limit` entries with their ids, newest first. Raises BadRequest for an invalid id.

        before: only entries older than this id. of_tenants: the actions of tenants instead of operators.
        """
        if before and not _ID.fullmatch(before):
            raise BadRequest(f"{before!r:.100} is not an entry's id, which looks like 1764043172123-0", param="after")
        stream = self._keys.tenants_audit if of_tenants else self._keys.audit
        entries = await self._redis.xrevrange(stream, f"({before}" if before else "+", "-", count=limit)
        return [(entry.decode(), decode(fields[b"b"], AuditEntry)) for entry, fields in entries]


def from_command_line(action: str, target: str, detail: str = "") -> AuditEntry:
    """Return the entry of an action on the command line, by the user of this process."""
    who = f"{_user()}@{socket.gethostname()}"
    return AuditEntry(now_ms(), CLI, who[:MAX_TEXT], "", action, target[:MAX_TEXT], detail[:MAX_TEXT], "done", True)


def _on_a_line(text: str) -> str:
    return text if text.isprintable() else repr(text)[1:-1][:MAX_TEXT]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"
