"""Gateway to gateway: webhook endpoints for the ends of jobs and batches, and pending deliveries."""

from __future__ import annotations

from protocol.wire.messages.base import Record


class WebhookEndpoint(Record, frozen=True):
    """A tenant's URL and the events that are sent to it."""

    id: str
    tenant: str
    name: str
    url: str
    events: list[str]  # job.completed, batch.failed …
    secret: str  # signing secret of events, encrypted with the fleet's secret
    hint: str  # the end of the secret, for display
    created_ms: int
    updated_ms: int
    old_secret: str = ""  # replaced secret with which events are still signed until `old_until_ms`
    old_until_ms: int = 0


class Delivery(Record, frozen=True):
    """An event on its way to an endpoint."""

    id: str  # id of event and endpoint, the same in every attempt
    event: str  # id of the event
    endpoint: str
    tenant: str
    type: str
    subject: str  # id of the job or batch that has ended
    created_ms: int
    attempts: int = 0
    error: str = ""  # error of the latest attempt
    tried_ms: int = 0
