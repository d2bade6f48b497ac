"""Lists of records in which an unreadable record does not hide the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from protocol.metrics.series import UNREADABLE
from protocol.runtime.guarded import FAILED
from protocol.wire import messages as m
from protocol.wire.codec import decode_record
from protocol.wire.errors import NewerRecord, UnreadableRecord

R = TypeVar("R", bound=m.Record)


def readable(raws: Iterable[bytes | None], type_: type[R], *, leave_newer: bool = False) -> list[R]:
    """Return the readable ones of these records, in order; unreadable ones are counted and logged.

    leave_newer: raise NewerRecord for a newer release's record, for callers that treat a missing record as deleted.
    """
    found: list[R] = []
    for raw in raws:
        if raw is None:
            continue
        try:
            found.append(decode_record(raw, type_))
        except UnreadableRecord as error:
            if leave_newer and isinstance(error, NewerRecord):
                raise
            UNREADABLE.labels(type_.__name__).inc()
            FAILED.note("records", error, f"a {type_.__name__}")
    return found
