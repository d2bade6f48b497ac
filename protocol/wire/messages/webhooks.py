"""Gateway to gateway: who is told that jobs and batches have ended, and what is still to be told."""

from __future__ import annotations

from protocol.wire.messages.base import Record


class WebhookEndpoint(Record, frozen=True):
    """A URL of a tenant, and the events that are sent there."""

    id: str
    tenant: str
    name: str
    url: str
    events: list[str]  # job.completed, batch.failed …
    secret: str  # that events are signed with, encrypted by the fleet's secret
    hint: str  # the end of it, to be shown
    created_ms: int
    updated_ms: int
    old_secret: str = ""  # one that was replaced and is still signed with
    old_until_ms: int = 0


class Delivery(Record, frozen=True):
    """An event on its way to an endpoint."""

    id: str  # of event and endpoint: the same however often it is sent
    event: str  # its id
    endpoint: str
    tenant: str
    type: str
    subject: str  # the job or batch that has ended
    created_ms: int
    attempts: int = 0
    error: str = ""  # of the latest attempt
    tried_ms: int = 0
