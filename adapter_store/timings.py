"""The pauses, lifetimes and limits of a store that are not settings: tests use other values than production."""

from __future__ import annotations

from dataclasses import dataclass, field

from adapter_store.sources.retry import Retries
from protocol.runtime.backoff import REFUSAL, TROUBLE, Backoff

CONTENT = Backoff(600.0, 86_400.0)
"""For content that cannot be served: each try may cost a whole download and a conversion."""


@dataclass(slots=True)
class StoreTimings:
    """How long a store waits and remembers. Each value is read when it is needed."""

    retries: Retries = field(default_factory=Retries)  # retries within one call to a source
    trouble: Backoff = TROUBLE  # between fetches of a name that failed for a temporary reason
    refusal: Backoff = REFUSAL  # between fetches of a refused name
    content: Backoff = CONTENT  # the same for a registered name whose content cannot be served
    reload_s: float = 10.0  # between reads of all registrations, in case an event was lost
    forget_refused_ms: int = 600_000  # retention of a failed name from a request, after its latest request
    forget_unused_ms: int = 7 * 86_400_000  # the same for a served name; its content stays until the space is needed
    max_on_request: int = 5000  # names from requests; the least recently requested are dropped first
    record_kept_s: float = 60.0  # retention of a content's record after its last name, for requests accepted before
