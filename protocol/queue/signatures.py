"""What each Lua script is called with: `TakeOver` is the signature of `take_over.lua`.

Its fields are the script's keys, then its arguments, in the order in which the script reads them. Lists come last: of
single words, or of groups of words. What each means is at the head of the script, under the same name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any, TypeAlias, get_args, get_origin, get_type_hints

import msgspec
from msgspec.structs import astuple

Key: TypeAlias = Annotated[str, "a key of the queue"]
Word: TypeAlias = str | bytes | int

_WORDS = re.compile(r"(?<=[a-z])(?=[A-Z])")  # where a word ends within a name


class Group(msgspec.Struct):  # a struct, as its call: a dataclass takes three times as long to make
    """Words that follow each other among a script's arguments, in the order of the fields."""


class Call(msgspec.Struct):
    """A call of a script. The first key of all, the prefix of the shard's keys, is left to `Scripts`."""

    @classmethod
    def script(cls) -> str:
        """Return the name of the script."""
        return _WORDS.sub("_", cls.__name__).lower()

    def laid_out(self) -> list[Any]:
        """Return the keys, then the arguments, as the script takes them."""
        _, num_single, have_groups = shape_of(type(self))
        values = astuple(self)
        found = [*values[:num_single]]
        for items, has_groups in zip(values[num_single:], have_groups, strict=True):
            if not has_groups:
                found += items
                continue
            for item in items:
                found += astuple(item)
        return found


@cache
def shape_of(kind: type[Call]) -> tuple[int, int, tuple[bool, ...]]:
    """Return how many fields are keys, how many come before the lists, and of each list whether it holds groups."""
    hints = list(get_type_hints(kind, include_extras=True).values())
    lists = [hint for hint in hints if get_origin(hint) is Sequence]
    items = [get_args(hint)[0] for hint in lists]
    groups = tuple(isinstance(item, type) and issubclass(item, Group) for item in items)
    return sum(hint is Key for hint in hints), len(hints) - len(lists), groups


# ------------------------------------------------------------ the life of a request


class BodyField(Group, kw_only=True):
    """A field of the hash of a call's bodies."""

    name: str
    value: bytes


class SubmitRow(Group, kw_only=True):
    """A request."""

    rid: str
    sub: bytes
    tenant: str
    digest: str
    gateway: str
    is_stored: int
    num_prompt: int
    num_virtual: int
    max_new: int
    deadline_ms: int
    usage: bytes


class Submit(Call, kw_only=True):
    """Accept a group of requests, the choices and prompts of one HTTP call: all of them, or none."""

    queue: Key
    idem: Key
    job: Key
    jobs: Key
    conversation: Key
    turns: Key
    cls: str
    max_queued: int
    idem_value: bytes
    who: str
    max_requests: int
    max_tokens: int
    max_running: int
    max_bytes: int
    is_forced: int
    num_bytes: int
    record_bytes: int
    jid: str
    job_record: bytes
    job_request: bytes
    job_ttl_ms: int
    is_told: int
    max_turns: int
    body_bytes: int
    history: str
    text: int
    num_fields: int
    fields: Sequence[BodyField]
    rows: Sequence[SubmitRow]


class AssignRow(Group, kw_only=True):
    """A request that a worker gets."""

    rid: str
    epoch: int
    placed: bytes


class Assign(Call, kw_only=True):
    """Hand a batch of queued requests to a worker: all of them, or none."""

    leader: Key
    work: Key
    token: str
    wid: str
    entry: bytes
    rows: Sequence[AssignRow]


class LogprobRow(Group, kw_only=True):
    """Logprob records of a request's tokens, or of its prompt."""

    rid: str
    seq0: int | str
    records: bytes


class EndRow(Group, kw_only=True):
    """The end of a request."""

    rid: str
    state: str
    finish: str
    error: str
    cached: int


class NoteRow(Group, kw_only=True):
    """How a request has run."""

    rid: str
    field: str
    timing: bytes


class OutRow(Group, kw_only=True):
    """What a gateway gets."""

    gateway: str
    deltas: bytes


class Step(Call, kw_only=True):
    """Make the tokens and ends of one engine step durable and visible: all of them, or none."""

    work: Key
    ended_stream: Key
    own: Key
    rows: bytes
    ids: bytes
    num_logprobs: int
    num_ends: int
    num_notes: int
    num_outs: int
    ended: bytes
    logprobs: Sequence[LogprobRow]
    ends: Sequence[EndRow]
    notes: Sequence[NoteRow]
    outs: Sequence[OutRow]
    done: Sequence[bytes]


class Finish(Call, kw_only=True):
    """End a request from outside its worker: its deadline has passed, or it was tried too often."""

    rid: str
    state: str
    reason: str
    error: str
    deltas: bytes
    order: bytes
    ended: bytes
    letter: bytes


class Cancel(Call, kw_only=True):
    """Cancel a request."""

    rid: str
    deltas: bytes
    order: bytes
    ended: bytes


class Requeue(Call, kw_only=True):
    """Take requests from a worker that died or drains, and queue them again with their tokens kept."""

    wid: str
    has_died: int
    name: str
    max_attempts: int
    rids: Sequence[str]


class Retry(Call, kw_only=True):
    """Queue the request of a dead letter again, with its tokens kept."""

    letter: str
    rid: str
    sub: bytes
    deadline_ms: int


class Repair(Call, kw_only=True):
    """Make a request's log at least as long as what a client has seen: Redis came back without the log's end."""

    rid: str
    seq0: int
    ids: bytes
    logprobs: bytes
    record_bytes: int


class Position(Call, kw_only=True):
    """Count the requests of the same class that were submitted before a queued one."""

    rid: str
    limit: int


class InputRow(Group, kw_only=True):
    """A request whose input is read."""

    rid: str
    call: str
    part: int


class Inputs(Call, kw_only=True):
    """Read what a worker needs of the requests that it was assigned."""

    rows: Sequence[InputRow]


class Forget(Call, kw_only=True):
    """Delete a job, or a call, with all that its requests have left, and give its tenant the bytes back."""

    job: Key
    jobs: Key
    idem: Key
    jid: str
    tenant: str
    text_ms: int
    rids: Sequence[str]


# ------------------------------------------------------------ the fleet


class Lead(Call, kw_only=True):
    """Take or keep the leadership among schedulers."""

    leader: Key
    leader_epoch: Key
    token: str
    candidate: str
    ttl_ms: int


class Join(Call, kw_only=True):
    """Register a worker under its base's name with its first beat, unless live workers serve another base by it."""

    base: Key
    bases: Key
    workers: Key
    worker_beat: Key
    wid: str
    beat: bytes
    ttl_ms: int
    at_ms: int
    name: str
    first: bytes
    further: bytes
    alone: bytes
    beside: bytes
    fleet: Sequence[str]


class Vital(Call, kw_only=True):
    """Run writes that the fleet lives by, all at once, also when the server's memory is full."""

    words: Sequence[Word]


# ------------------------------------------------------------ what outlives a connection


class KeepFile(Call, kw_only=True):
    """Note a file, whose bytes are in the gateways' storage, or hold room for one."""

    file: Key
    files: Key
    sizes: Key
    expiry: Key
    id: str
    tenant: str
    record: bytes
    num_bytes: int
    created_ms: int
    expires_ms: int
    max_bytes: int
    max_files: int


class DropFile(Call, kw_only=True):
    """Forget a file."""

    file: Key
    files: Key
    sizes: Key
    expiry: Key
    id: str
    tenant: str


class OpenBatch(Call, kw_only=True):
    """Take a batch, for any gateway to run."""

    batch: Key
    batches: Key
    open_batches: Key
    tenant_open: Key
    id: str
    tenant: str
    record: bytes
    created_ms: int
    ttl_ms: int
    max_open: int


class ClaimBatch(Call, kw_only=True):
    """Let a gateway run a batch that nobody runs, or go on with one that it runs."""

    batch: Key
    open_batches: Key
    id: str
    tenant: str
    gid: str
    lease_ms: int


class SaveBatch(Call, kw_only=True):
    """Write how far a batch is, by the gateway that runs it."""

    batch: Key
    open_batches: Key
    tenant_open: Key
    id: str
    tenant: str
    epoch: int
    record: bytes
    outcome: str
    status: str
    wait_ms: int
    tries: int | str


class ItemRow(Group, kw_only=True):
    """An item that a conversation gets."""

    item_id: str
    item: bytes


class ChangeConversation(Call, kw_only=True):
    """Make or change a conversation: its record, and what is added to its items."""

    conversation: Key
    items: Key
    order: Key
    turns: Key
    conversations: Key
    all_turns: Key
    id: str
    tenant: str
    record: bytes
    is_new: int
    ttl_ms: int
    max_conversations: int
    max_items: int
    max_bytes: int
    max_kept: int
    response: str
    new_items: Sequence[ItemRow]


class DropConversation(Call, kw_only=True):
    """Delete a conversation, or one of its items, and give its tenant the bytes back."""

    conversation: Key
    items: Key
    order: Key
    turns: Key
    conversations: Key
    id: str
    tenant: str
    item_id: str


class KeepHook(Call, kw_only=True):
    """Write an endpoint of webhooks: a new one, unless its tenant has too many, or one that is still there."""

    hooks: Key
    id: str
    record: bytes
    most: int


class DropEnds(Call, kw_only=True):
    """Forget ends of a tenant that deliveries were made of, and put it behind all others that wait for their turn."""

    tenant_ends: Key
    ends: Key
    tenant: str
    entries: Sequence[str]


class DeliveryRow(Group, kw_only=True):
    """A delivery that is noted."""

    id: str
    record: bytes


class AddDeliveries(Call, kw_only=True):
    """Note deliveries of one tenant, due now, as long as few of its wait; they are no longer given up."""

    outbox: Key
    times: Key
    undelivered: Key
    outboxes: Key
    tenant: str
    max_waiting: int
    deliveries: Sequence[DeliveryRow]


class TakeDeliveries(Call, kw_only=True):
    """Give a tenant its turn."""

    outbox: Key
    times: Key
    outboxes: Key
    tenant: str
    num: int
    claim_ms: int


class TakeOver(Call, kw_only=True):
    """Give each tenant what the version before kept of all together: endpoints, ends and deliveries."""

    num: int


# ------------------------------------------------------------ books


class ResidencyRow(Group, kw_only=True):
    """The time of an adapter in a pool."""

    digest: str
    ms: int


class NoteResidency(Call, kw_only=True):
    """Add to the time for which adapters were in pools on a day."""

    residency: Key
    max_digests: int
    others: str
    ttl_s: int
    times: Sequence[ResidencyRow]


SIGNATURES: tuple[type[Call], ...] = tuple(Call.__subclasses__())
"""The signatures of all scripts."""
