"""A request as the scheduler sees it, from its submission to its end."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from protocol.wire import messages as m

BASE = ""
"""The digest of requests for the base model."""


@dataclass(slots=True, eq=False)
class Request:
    """One request that has not ended. `wid` is "" while it is queued."""

    submit: m.Submit
    epoch: int  # as read from the queue; its assignment carries epoch + 1
    attempts: int = 0  # workers that died under it before it made progress
    order: int = 0  # of arrival
    wid: str = ""
    dropped: bool = False  # left the backlog; containers forget it when they meet it
    input_charged: bool = False
    output_charged: int = 0  # tokens of the log paid for; -1: all there are at first sight
    start_tokens: int = 0  # length of the log when its worker got it; -1: not seen yet
    started: bool = False  # seen to have made progress since then
    ready: bool = False  # its adapter is on the worker, so it takes capacity
    reserved_tokens: int = 0  # prompt and expected output, as counted on its worker
    held_since_ms: float = -1.0  # when it was first passed over to wait for a warmer worker; -1: never
    held_until_ms: float = 0.0
    gives_way: bool = False  # to other tenants' requests, see `Shares`
    over_share: bool = False  # others, who are not, may take its place

    @property
    def rid(self) -> str:
        return self.submit.rid

    @property
    def resumed(self) -> bool:
        """True for one that a worker has had before."""
        return self.epoch > 0

    @property
    def sort_key(self) -> tuple[int, int]:
        """Earliest deadline first, then order of arrival."""
        return self.submit.deadline_ms, self.order


def decrement(counter: Counter[Any], key: Any) -> None:
    """Count one less, and forget what has come to nothing."""
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
