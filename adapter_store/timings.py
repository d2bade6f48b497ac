"""The pauses, lifetimes and bounds of a store that are no settings: one value in production, others in tests."""

from __future__ import annotations

from dataclasses import dataclass, field

from adapter_store.sources.retry import Retries
from protocol.runtime.backoff import REFUSAL, TROUBLE, Backoff


@dataclass(slots=True)
class StoreTimings:
    """How long a store waits and remembers. It reads each value when it needs it."""

    retries: Retries = field(default_factory=Retries)  # retries within one call to a source
    trouble: Backoff = TROUBLE  # between fetches of a name that failed for a reason that passes by itself
    refusal: Backoff = REFUSAL  # between fetches of a name that was refused, if it is requested again
    reload_s: float = 10.0  # between reads of all registrations, should an event have been lost
    forget_refused_ms: int = 600_000  # a name from a request that could not be served, after its latest request
    forget_unused_ms: int = 7 * 86_400_000  # one that was served; its content stays until the disk space is needed
    max_on_request: int = 5000  # names from requests; those that were requested least recently go first
    record_kept_s: float = 60.0  # a content's record after its last name, for requests that were accepted before
