"""Adapters that failed to load: until the next retry is due, their requests get the same error."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from protocol.runtime.backoff import REFUSAL, TROUBLE, Backoff
from protocol.wire.errors import AdapterRefused, LorafleetError


@dataclass(slots=True)
class _Failure:
    error: LorafleetError
    num_in_row: int
    again_s: float


class LoadFailures:
    """The last failure of each adapter. Times are monotonic seconds."""

    def __init__(self, trouble: Backoff = TROUBLE, max_kept: int = 10_000) -> None:
        """trouble: backoff between retries, for all failures except refusals.

        max_kept: number of adapters remembered; the one that failed longest ago is forgotten first.
        """
        self._trouble = trouble
        self._max_kept = max_kept
        self._kept: OrderedDict[str, _Failure] = OrderedDict()

    def note(self, digest: str, error: LorafleetError, now_s: float) -> None:
        """Record a failed load; the pause before a retry grows with consecutive failures."""
        last = self._kept.pop(digest, None)
        num_in_row = last.num_in_row + 1 if last is not None else 1
        pause_s = (REFUSAL if isinstance(error, AdapterRefused) else self._trouble).pause_s(num_in_row)
        self._kept[digest] = _Failure(error, num_in_row, now_s + pause_s)
        if len(self._kept) > self._max_kept:
            self._kept.popitem(last=False)

    def error(self, digest: str, now_s: float) -> LorafleetError | None:
        """Return the error if a retry of an adapter is not due yet, else None."""
        failure = self._kept.get(digest)
        return failure.error if failure is not None and now_s < failure.again_s else None

    def forget(self, digest: str) -> None:
        """Forget an adapter's failures: it was loaded, or must be retried at once."""
        self._kept.pop(digest, None)
