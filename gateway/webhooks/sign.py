"""The events' JSON and signatures (Standard Webhooks, https://www.standardwebhooks.com). Pure."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from collections.abc import Sequence
from typing import Any

import orjson

PREFIX = "whsec_"
NUM_SECRET_BYTES = 32

BATCH_EVENTS = tuple(f"batch.{end}" for end in ("completed", "failed", "expired", "cancelled"))
JOB_EVENTS = tuple(f"job.{end}" for end in ("completed", "failed", "cancelled"))
RESPONSE_EVENTS = tuple(f"response.{end}" for end in ("completed", "failed", "incomplete", "cancelled"))
EVENTS = (*BATCH_EVENTS, *RESPONSE_EVENTS, *JOB_EVENTS)
"""The event types. Those of jobs are specific to this project."""


def new_secret() -> str:
    """Return a new secret in the form given to clients."""
    return PREFIX + base64.b64encode(secrets.token_bytes(NUM_SECRET_BYTES)).decode()


def event_id(type_: str, subject: str) -> str:
    """Return the id of an event, which is deterministic: the same event has the same id."""
    return "evt_" + hashlib.sha256(f"{type_}/{subject}".encode()).hexdigest()[:24]


def event_body(event: str, type_: str, subject: str, created_s: int) -> bytes:
    """Return an event as JSON."""
    fields: dict[str, Any] = {
        "id": event,
        "object": "event",
        "type": type_,
        "created_at": created_s,
        "data": {"id": subject},
    }
    return orjson.dumps(fields)


def signed_headers(event: str, body: bytes, now_s: int, keys: Sequence[str]) -> dict[str, str]:
    """Return the headers of a delivery: id, time, and one signature per secret."""
    signed = f"{event}.{now_s}.".encode() + body
    digests = [hmac.digest(base64.b64decode(key.removeprefix(PREFIX)), signed, "sha256") for key in keys]
    return {
        "webhook-id": event,
        "webhook-timestamp": str(now_s),
        "webhook-signature": " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests),
        "content-type": "application/json",
        "user-agent": "lorafleet-webhooks",
    }
