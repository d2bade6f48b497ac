"""The bodies of the webhook endpoints' routes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gateway.bodies.parameter_check import JsonBody
from gateway.webhooks.outside import MAX_URL_CHARACTERS
from gateway.webhooks.sign import EVENTS

EventTypes = Annotated[list[Annotated[str, Field(max_length=64)]], Field(min_length=1, max_length=len(EVENTS))]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Url = Annotated[str, Field(max_length=MAX_URL_CHARACTERS)]


class WebhookRequest(JsonBody):
    """`POST /v1/webhook_endpoints`."""

    OBJECT = "webhook"

    name: Name
    url: Url
    event_types: EventTypes


class WebhookChange(JsonBody):
    """`POST /v1/webhook_endpoints/{id}`: omitted fields are unchanged."""

    OBJECT = "webhook_change"

    name: Name | None = None
    url: Url | None = None
    event_types: EventTypes | None = None


class WebhookRotation(JsonBody):
    """`POST /v1/webhook_endpoints/{id}/rotate_secret`."""

    OBJECT = "webhook_rotation"

    keep_old_secret_active_for_24_hours: bool | None = None


class WebhookTest(JsonBody):
    """`POST /v1/webhook_endpoints/{id}/test`."""

    OBJECT = "webhook_test"

    event_type: Annotated[str, Field(max_length=64)]
