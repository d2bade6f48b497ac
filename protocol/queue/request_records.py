"""Records of requests, decoded from the hashes that the scripts write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from protocol.queue.books.usage import base_of, model_of, owner_of
from protocol.wire import messages as m
from protocol.wire.codec import decode
from protocol.wire.records import FIRST_NOTES, LAST_NOTES, Assignment, RequestFacts, RequestRecord

FACTS = (
    "state", "epoch", "finish", "error", "gateway", "n_prompt", "attempts", "t_submit", "t_first", "t_end", "t_assign",
)  # fmt: skip
"""The fields of a request's hash that `facts_of` takes, in this order."""


def facts_of(values: Sequence[bytes | None], log_bytes: int) -> RequestFacts:
    """Return the facts of a request. values: its `FACTS`. log_bytes: size of its log."""
    state, epoch, finish, error, gateway, *rest = ((value or b"").decode() for value in values)
    num_prompt, attempts, *times = (int(float(text or 0)) for text in rest)
    return RequestFacts(state, int(epoch or 0), finish, error, gateway, num_prompt, log_bytes // 4, attempts, *times)


def record_of(fields: Mapping[bytes, bytes], log_bytes: int) -> RequestRecord:
    """Return a request's record. fields: its hash. log_bytes: size of its log. Raises ProtocolError."""

    def text(name: str) -> str:
        return fields.get(name.encode(), b"").decode()

    def number(name: str) -> int:
        return int(float(text(name) or 0))

    facts = facts_of([fields.get(name.encode()) for name in FACTS], log_bytes)
    usage = fields.get(b"usage", b"")
    return RequestRecord(
        facts, owner_of(usage) or text("tenant"), text("cls"), text("digest"), model_of(usage), text("call"),
        number("cached"), number("ahead"), number("deadline"), _assignments(fields),
        base_of(usage),
    )  # fmt: skip


def _assignments(fields: Mapping[bytes, bytes]) -> list[Assignment]:
    found: list[Assignment] = []
    for slot in range(1, FIRST_NOTES + LAST_NOTES + 1):
        placed, run, left = (fields.get(f"{kind}:{slot}".encode()) for kind in ("placed", "run", "left"))
        if placed is not None:
            left_ms, _, how = (left or b"0").decode().partition(" ")
            timing = decode(run, m.Timing) if run is not None else None
            found.append(Assignment(decode(placed, m.Placed), timing, int(left_ms), how))
    return sorted(found, key=lambda one: one.placed.ms)
