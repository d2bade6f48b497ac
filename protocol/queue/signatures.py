"""The arguments of each Lua script: `TakeOver` is the signature of `take_over.lua`.

Its fields are the script's keys, then its arguments, in the order in which the script reads them. Lists come last: of
single words or of groups of words. The head of the script describes each under the same name.
"""

from __future__ import annotations

from collections.abc import Sequence

from protocol.queue.kept import signatures as kept
from protocol.queue.script_call import Call, Group, Key, Word

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
    tokenizer: str
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
    """Logprob records of a request's output tokens or of its prompt."""

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
    """The timing of a request's assignment."""

    rid: str
    field: str
    timing: bytes


class OutRow(Group, kw_only=True):
    """The deltas for one gateway."""

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
    """Delete a job, or a call, with everything stored about its requests, and give its tenant the bytes back."""

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
    """Register a worker under its base's name with its first heartbeat, unless something has changed."""

    bases: Key
    workers: Key
    worker_beat: Key
    wid: str
    beat: bytes
    ttl_ms: int
    at_ms: int
    name: str
    known: bytes
    served: bytes
    num_others: int
    more: Sequence[str]


class Vital(Call, kw_only=True):
    """Run essential writes atomically, even while the server's memory is full."""

    words: Sequence[Word]


# ------------------------------------------------------------ books


class ResidencyRow(Group, kw_only=True):
    """How long an adapter was resident."""

    digest: str
    ms: int


class NoteResidency(Call, kw_only=True):
    """Add to the time for which adapters were resident on a day."""

    residency: Key
    max_digests: int
    others: str
    ttl_s: int
    times: Sequence[ResidencyRow]


SIGNATURES: tuple[type[Call], ...] = (
    *kept.SIGNATURES,
    *(call for call in Call.__subclasses__() if call.__module__ == __name__),
)
"""The signatures of all scripts."""
