"""*Submit*, the sixth stage: write a call's requests into the queue, one per choice, atomically."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from msgspec import Struct, structs

from gateway.adapters.resolver import CallTarget
from gateway.calls import observe
from gateway.calls.admit import AdmittedCall, CallAdmission
from gateway.calls.parsed_call import ParsedCall
from gateway.calls.replies import Replies, Subscription
from gateway.calls.tokenize import Prompt
from gateway.calls.trace import TRACE_OF
from gateway.http.errors import OUTCOME_OF
from peft_adapters.recipe import is_merge
from protocol.queue.books.usage import CountedFor, usage_of
from protocol.queue.bus import Bus, decode, now_ms
from protocol.queue.connection.line import LOST
from protocol.queue.history import kept_for
from protocol.queue.kept.jobs import NewJob
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.messages.requests import fields_in_use

PREFIX_TOKENS = 128  # prompt tokens hashed for the scheduler's prefix affinity

Requests = list[tuple[m.RequestHead, m.Body]]


class SubmittedCall(Struct, frozen=True):
    """A call whose requests are in the queue, submitted now or by an earlier call with the same Idempotency-Key."""

    id: str
    parsed: ParsedCall
    base: m.ServedModel | None  # None: an earlier call, and no worker has reported its model here
    prompts: list[Prompt]
    created_ms: int
    deadline_ms: int
    ended_ms: int = 0  # unix time of its end, 0 if unknown
    submitted_s: float = 0.0  # monotonic time of its submission
    poll_s: float = 0.0  # seconds between reads of the log if another gateway gets the deltas; 0: this one does
    mail: Subscription | None = None  # mailbox for its deltas; None if no client waits for them
    resubmit: Callable[[], Awaitable[object]] | None = None  # idempotent; used if the queue has lost the requests

    @property
    def rids(self) -> list[str]:
        """The ids of its requests, in the order of the choices."""
        return [rid_of(self.id, i) for i in range(len(self.prompts) * self.parsed.options.n)]

    @property
    def targets(self) -> list[CallTarget]:
        """The targets of the call."""
        return targets_of(self.parsed, self.prompts)


class Submitter:
    """Writes calls into the queue."""

    def __init__(self, settings: Settings, bus: Bus, replies: Replies, admission: CallAdmission) -> None:
        self._max_queued = settings.max_queued
        self._keep_bodies = settings.keep_prompts
        self._usage_days = settings.usage_days
        self._history = kept_for(settings.history_s, settings.history_requests)
        self._history_text = settings.history_text
        self._bus = bus
        self._replies = replies
        self._admission = admission

    async def submit(
        self, call: AdmittedCall, job: Callable[[SubmittedCall], NewJob] | None = None
    ) -> SubmittedCall | m.Idempotent:
        """Submit a call whose tokens come to this gateway; or return the record of its Idempotency-Key's first use.

        job: makes the job that stores the call, None if it is not a job. Raises Overloaded, Unavailable; the mailbox is
        closed then.
        """
        made = self.made(call)
        empty = made.parsed.options.is_empty
        stored = bool(made.parsed.key) or job is not None
        requests = [] if empty else self.requests(made, gateway=self._replies.gid, stored=stored)
        mail = self._replies.subscribe(made.rids, eager=made.parsed.options.stream)
        if empty:
            return structs.replace(made, mail=mail)
        new = job(made) if job is not None else None
        record = record_of(made, new.job.jid if new is not None else "") if made.parsed.key else None
        try:
            earlier = await self.put(call, requests, record, new)
        except asyncio.CancelledError:
            self._replies.unsubscribe(mail)
            if not made.parsed.key:
                await self._replies.cancel(made.rids)  # the queue may have accepted it
            raise
        except BaseException:
            self._replies.unsubscribe(mail)
            raise
        if earlier is not None:
            self._replies.unsubscribe(mail)
            return earlier
        # forced: an accepted call must not be refused when it is resubmitted to a queue that lost its last second.
        return structs.replace(
            made, mail=mail, resubmit=partial(self._write, call, requests, record, forced=True, job=new)
        )

    def made(self, call: AdmittedCall) -> SubmittedCall:
        """Return the call as submitted, with its id, creation time and deadline."""
        created_ms = now_ms()
        deadline_ms = created_ms + int(self._admission.lifetime_s(call.parsed) * 1000)
        return SubmittedCall(
            call.parsed.call_id or secrets.token_hex(16),
            call.parsed,
            call.base,
            call.prompts,
            created_ms,
            deadline_ms,
            submitted_s=time.monotonic(),
        )

    def requests(self, call: SubmittedCall, *, gateway: str, stored: bool) -> Requests:
        """Return a call's requests, one per choice; choices of one prompt share a body.

        gateway: id of the gateway that gets the tokens, "" for none. stored: the requests outlive their client. Raises
        Unavailable if a call in the foreground uses features that no worker supports.
        """
        options, caller = call.parsed.options, call.parsed.caller
        weight = caller.tenant.weight if caller.tenant is not None else 1.0
        bodies = [self._body(call.parsed, prompt) for prompt in call.prompts]
        needs = [sorted({*fields_in_use(body.sampling), *fields_in_use(body)}) for body in bodies]
        if not options.background:
            self._admission.check_known([name for names in needs for name in names])
        trace = TRACE_OF.get()
        traceparent = trace.place.traceparent if trace is not None else ""
        found: Requests = []
        for index, rid in enumerate(call.rids):
            which, choice = divmod(index, options.n)
            prompt = call.prompts[which]
            submit = m.RequestHead(
                rid=rid, tenant=prompt.target.payer(caller), cls=call.parsed.cls, digest=prompt.target.digest,
                num_prompt_tokens=prompt.num_tokens, max_new_tokens=prompt.max_new_tokens,
                deadline_ms=call.deadline_ms, gateway=gateway, stored=stored, submitted_ms=now_ms(),
                prefix=prefix_hash(prompt.ids), weight=weight, choice=choice, needs=needs[which],
                trace=traceparent, num_virtual=prompt.target.num_virtual,
                base=call.base.name if call.base is not None else "",
            )  # fmt: skip
            found.append((submit, bodies[which]))
        return found

    def _body(self, call: ParsedCall, prompt: Prompt) -> m.Body:
        options = call.options
        own_ends = [] if options.sampling.ignore_eos else sorted(prompt.files.own_ends)
        sampling = options.sampling
        if prompt.bad_words:
            sampling = structs.replace(sampling, bad_words=prompt.bad_words)
        return m.Body(
            prompt=prompt.ids,
            sampling=sampling,
            max_new_tokens=prompt.max_new_tokens,
            stop=options.stop,
            stop_token_ids=[*options.stop_token_ids, *own_ends] if own_ends else options.stop_token_ids,
            lora_scale=1.0 if options.lora_scale is None or not prompt.target.digest else options.lora_scale,
            salt=call.salt,
            grammar=prompt.grammar,
            task=call.task,
            second=prompt.second,
        )

    async def put(
        self, call: AdmittedCall, requests: Requests, record: m.Idempotent | None, job: NewJob | None = None
    ) -> m.Idempotent | None:
        """Write requests into the queue; return the record of the Idempotency-Key's first use, if the key is used.

        record: stored under that key. job: the job of a background call. Raises Overloaded.
        """
        try:
            outcome, result = await self._write(call, requests, record, job=job)
            if outcome == "idem":
                return decode(result, m.Idempotent)
            self._admission.settle(call, outcome, result)
        except LOST:
            if record is None:
                self._replies.abandon([head.rid for head, _ in requests])  # its client has no key to find it by
            raise
        finally:
            self._admission.reached_queue()
        observe.accepted(call.parsed.caller.owner, call.prompts)
        outcome_of_call = OUTCOME_OF.get(None)
        if outcome_of_call is not None:
            outcome_of_call.is_queued = True
        return None

    async def _write(
        self,
        call: AdmittedCall,
        requests: Requests,
        record: m.Idempotent | None,
        *,
        forced: bool = False,
        job: NewJob | None = None,
    ) -> tuple[str, Any]:
        """Write requests into the queue, or find them there; see `Bus.submit`. forced: ignore limits."""
        caller, key = call.parsed.caller, call.parsed.key
        history, text = ("", 0) if caller.is_batch else (self._history, self._history_text)
        return await self._bus.submit(
            call.parsed.cls, requests, max_queued=1 << 31 if forced else self._max_queued,
            idem_key=self._bus.keys.idem(caller.owner, key) if key else "",
            idem_value=m.encode(record) if record is not None else b"",
            quota=call.quota, forced=forced, job=job, keep_bodies=self._keep_bodies,
            usages=usages_of(call, self._usage_days), history=history, text=text,
            tokenizer=call.prompts[0].files.tokenizer,
        )  # fmt: skip


def targets_of(parsed: ParsedCall, prompts: Sequence[Prompt]) -> list[CallTarget]:
    """Return the targets of a call, in order."""
    return [prompt.target for prompt in prompts[:: len(parsed.sources)]]


def usages_of(call: AdmittedCall, days: int) -> list[bytes]:
    """Return the usage that each request of a call, in the order of choices, adds for its tenant when it ends.

    As in the answer's `usage`, a call counts once per target, and a prompt once whatever n is. days: how long the usage
    is kept.
    """
    parsed = call.parsed
    found: list[bytes] = []
    has_output = not parsed.options.scores_only and parsed.options.output != "numbers"
    for which, prompt in enumerate(call.prompts):
        target = prompt.target
        counted = CountedFor(
            parsed.caller.owner,
            observe.name_of(target),
            "" if is_merge(target.digest) else target.digest,
            call.base.name,
            parsed.caller.is_batch,
            days,
        )
        for choice in range(parsed.options.n):
            calls = int(choice == 0 and which % len(parsed.sources) == 0)
            num = 0 if choice else prompt.num_tokens
            found.append(usage_of(counted, calls=calls, prompt_tokens=num, has_output=has_output))
    return found


def record_of(call: SubmittedCall, jid: str = "") -> m.Idempotent:
    """Return the record stored under a call's Idempotency-Key. jid: id of its job, "" if it has none."""
    assert call.parsed.sent is not None
    body_hash = call.parsed.sent.hash
    return m.Idempotent(body_hash=body_hash, created_ms=call.created_ms, rids=call.rids, jid=jid, **facts_of(call))


def facts_of(call: SubmittedCall) -> dict[str, Any]:
    """Return the facts that are needed, besides a call's body, to write its answer later.

    They are the base, the targets' digests and hashes of their own texts, whether each prompt ends within the model's
    reasoning, and whether its answer can have any.
    """
    first = call.prompts[:: len(call.parsed.sources)]
    return {
        "base": call.base.name if call.base is not None else "",
        "digests": [prompt.target.digest for prompt in first],
        "texts": [prompt.target.texts for prompt in first],
        "opened": [prompt.form is not None and prompt.form.opened for prompt in first],
        "without_thought": [prompt.form is None or prompt.form.thought is None for prompt in first],
    }


def rid_of(call: str, index: int) -> str:
    """Return the id of the request of a call's choice."""
    return f"{call}-{index}"


def call_of(rid: str) -> str:
    """Return the id of the call that a request belongs to."""
    return rid.rpartition("-")[0]


def prefix_hash(ids: bytes) -> str:
    """Return a hash of the first `PREFIX_TOKENS` of a prompt (int32 ids), "" for a shorter one."""
    size = PREFIX_TOKENS * 4
    return hashlib.blake2b(ids[:size], digest_size=8).hexdigest() if len(ids) >= size else ""
