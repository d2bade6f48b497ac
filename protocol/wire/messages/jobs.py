"""Gateway to gateway: background jobs and idempotent calls."""

from __future__ import annotations

from typing import Any

from protocol.wire.messages.base import Wire


class Job(Wire, frozen=True):
    """A background request: which requests it is made of, and how its result is written."""

    jid: str
    endpoint: str
    tenant: str
    model: str  # as the client named it
    created_ms: int
    expires_ms: int
    rids: list[str]
    request: dict[str, Any]  # the HTTP body, to build the result as the endpoint would
    metadata: dict[str, str] = {}
    digests: list[str] = []  # of the adapters that answer, "" for the base model
    texts: list[str] = []  # of each, the hash of the tokenizer and template it brings, "" if none
    opened: list[bool] = []  # of each, whether its prompt ends within the model's reasoning


class Idempotent(Wire, frozen=True):
    """What an Idempotency-Key was first used for, so that a repetition finds the same requests."""

    body_hash: str  # sha256 of endpoint and HTTP body
    created_ms: int
    rids: list[str]
    digests: list[str] = []  # of the adapters that answer, "" for the base model
    texts: list[str] = []  # of each, the hash of the tokenizer and template it brings, "" if none
    jid: str = ""  # of a background job
    opened: list[bool] = []  # as in `Job`
