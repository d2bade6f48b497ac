"""Lists of records, of which one that cannot be read hides no other."""

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
    """Return those of these records that are there and can be read, in their order; the others are counted and logged.

    leave_newer: for who takes what is not among them for deleted; raises NewerRecord if one is for newer releases.
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
