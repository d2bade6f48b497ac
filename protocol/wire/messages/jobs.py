"""Gateway to gateway: background jobs and idempotent calls."""

from __future__ import annotations

from protocol.wire.messages.base import Record


class Job(Record, frozen=True):
    """A background request: its requests in the queue, and what lists show of it."""

    jid: str
    endpoint: str
    tenant: str
    model: str  # model named by the client
    created_ms: int
    expires_ms: int
    rids: list[str]
    metadata: dict[str, str] = {}
    digests: list[str] = []  # digests of the answering adapters, "" for the base model
    texts: list[str] = []  # per adapter, hash of the tokens and template it brings, "" if none
    opened: list[bool] = []  # per adapter, whether its prompt ends inside the model's reasoning
    background: bool = True  # no client follows it, so webhooks report its end
    key: str = ""  # the Idempotency-Key with which it was created; "": none
    conversation: str = ""  # conversation to which its turn is added at the end; "": none
    base: str = ""  # name of the base that answers, also beneath adapters; "": the fleet's default
    without_thought: list[bool] = []  # per adapter, whether its answer has no reasoning, as when it continues a text


class Conversation(Record, frozen=True):
    """A conversation that clients keep. Its items are in a key of their own, as JSON."""

    id: str
    tenant: str
    created_ms: int
    metadata: dict[str, str] = {}


class Idempotent(Record, frozen=True):
    """The call for which an Idempotency-Key was first used, so that a repetition finds the same requests."""

    body_hash: str  # sha256 of endpoint and HTTP body
    created_ms: int
    rids: list[str]
    digests: list[str] = []  # digests of the answering adapters, "" for the base model
    texts: list[str] = []  # per adapter, hash of the tokens and template it brings, "" if none
    jid: str = ""  # id of a background job
    opened: list[bool] = []  # see `Job.opened`
    base: str = ""  # see `Job.base`
    without_thought: list[bool] = []  # see `Job.without_thought`
