"""Which rows the queue has found a worker to own, so that the next step need not ask again. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from protocol.bus import StepRow


class Verified:
    """What one worker was found to own at one version of its `own` hash, in one life of the queue's server."""

    def __init__(self) -> None:
        self.version = b""
        self._epochs: dict[str, int] = {}

    def forget(self) -> None:
        """The server has started anew, and may have lost what it said last."""
        self.note(b"", ())

    def split(self, rows: Iterable[StepRow]) -> tuple[list[StepRow], int]:
        """Return the rows with those first that must be looked at while the version stays, and their number.

        Beside unknown rows these are ends, which a log's length may not tell from their own repetition, and first
        tokens, whose request may have expired.
        """
        known: list[StepRow] = []
        unknown: list[StepRow] = []
        for row in rows:
            is_known = row.seq0 and not row.state and self._epochs.get(row.rid) == row.epoch
            (known if is_known else unknown).append(row)
        return unknown + known, len(unknown)

    def note(self, version: bytes, rows: Iterable[StepRow]) -> None:
        """Note that `rows` were written, and are owned at `version`; b"": nothing is known for the next time."""
        if version != self.version:
            self.version = version
            self._epochs.clear()
        if version:
            for row in rows:
                if row.state:
                    self._epochs.pop(row.rid, None)
                else:
                    self._epochs[row.rid] = row.epoch
