"""Background jobs: calls that outlive their client. Any gateway can show any job, from the queue's records."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import orjson

from gateway.auth.callers import EVERYBODY, Caller
from gateway.bodies.json_values import loads_kept
from gateway.calls.admit import AdmittedCall
from gateway.calls.choices import Choice, Piece, best_of, tokens_of
from gateway.calls.earlier import check_same_body
from gateway.calls.follow import choices_of, log_limit, usage_of
from gateway.calls.parsed_call import ParsedCall, Sent
from gateway.calls.pipeline import Pipeline
from gateway.calls.size import TextGrowth, first_event_bytes
from gateway.calls.submit import SubmittedCall, facts_of, record_of
from gateway.calls.waiting import waiting_state
from gateway.calls.writers import Writer
from gateway.http.list_page import list_page
from gateway.jobs.job_events import JobEvents
from gateway.jobs.job_readers import JobReaders
from gateway.jobs.job_stream import JobStream, numbers_of
from gateway.overload import large, reads
from gateway.overload.cost import held, hold
from gateway.overload.loop_slice import LoopSlice
from gateway.overload.memory import values_bytes
from protocol.queue.bus import RequestFacts, now_ms
from protocol.queue.kept.jobs import NewJob
from protocol.wire import messages as m
from protocol.wire.codec import as_kept
from protocol.wire.error_codec import error_from
from protocol.wire.errors import BadRequest, NotFound

ID_PREFIX = "job_"
MAX_WAIT_S = 120.0
KEPT_AFTER_EXPIRY_S = 3600

MAX_PAGE_COST = 1 << 20
"""Maximum cost of a page of a list, except its last few jobs: the bytes of their records, plus `_LOOK_UP_COST` each."""

_LOOK_UP_COST = 1024  # cost of reading one request: 2 µs of the queue, 20 µs here
_AT_ONCE = 8  # jobs of a list, or requests of a job, read together

JobStatus = Literal["queued", "running", "completed", "failed", "cancelled", "expired"]
Facts = Sequence[RequestFacts | None]


@dataclass(frozen=True, slots=True)
class JobApi:
    """The first and the last stage of an endpoint whose calls may be jobs."""

    parse: Callable[[Mapping[str, Any], Caller], ParsedCall]  # parses a body given as JSON
    writer: Callable[[SubmittedCall, Sequence[Choice]], Writer]
    generates: bool = True  # whether answers are generated token by token
    id_prefix: str = ID_PREFIX


class Jobs:
    """The jobs of the fleet."""

    def __init__(self, pipeline: Pipeline, apis: Mapping[str, JobApi]) -> None:
        """apis: endpoint -> its stages."""
        self._pipeline = pipeline
        self._bus = pipeline.bus
        self._apis = dict(apis)
        self.readers = JobReaders(pipeline.settings.keepalive_s)
        self.before_forget: Callable[[m.Job], Awaitable[None]] = _do_nothing
        """Called before a job is deleted."""

    def serve(self, endpoint: str, api: JobApi) -> None:
        """Register an endpoint whose calls may be jobs."""
        self._apis[endpoint] = api

    async def create(self, call: AdmittedCall, sent: Sent, request: bytes) -> dict[str, Any]:
        """Submit a call as a job and return it. Raises Overloaded.

        request: as JSON, the part of the body needed to write the answer, in the form that `JobApi.parse` accepts.
        """
        caller = call.parsed.caller
        made = await self.submit(call, sent, request)
        if isinstance(made, m.Idempotent):
            return await self.get(made.jid, caller)
        return await self._view(made, await self.facts(made), whole=True)

    async def submit(
        self, call: AdmittedCall, sent: Sent, request: bytes, conversation: str = ""
    ) -> m.Job | m.Idempotent:
        """Submit a call as a job that no client follows; or return the record of its Idempotency-Key's first use.

        request: as for `create`. conversation: id of the conversation that gets its turn, "" for
        none. Raises Overloaded, and IdempotencyKeyReused for a key that was used with another body.
        """
        submitter = self._pipeline.submitter
        made = submitter.made(call)
        new = self.new(made, sent, request, conversation=conversation)
        record = record_of(made, new.job.jid) if sent.key else None
        earlier = await submitter.put(call, submitter.requests(made, gateway="", stored=True), record, new)
        if earlier is None:
            return new.job
        check_same_body(earlier, sent)
        return earlier

    def new(
        self,
        made: SubmittedCall,
        sent: Sent,
        request: bytes,
        *,
        background: bool = True,
        conversation: str = "",
    ) -> NewJob:
        """Return a call's job record.

        background: no client follows it, so webhooks report its end. conversation: id of the conversation that gets its
        turn.
        """
        job = m.Job(
            jid=self._apis[sent.endpoint].id_prefix + made.id,
            endpoint=sent.endpoint,
            tenant=made.parsed.caller.owner,
            model=made.parsed.model_name,
            created_ms=made.created_ms,
            expires_ms=made.deadline_ms,
            rids=made.rids,
            metadata=dict(made.parsed.metadata),
            key=sent.key,
            background=background,
            conversation=conversation,
            **facts_of(made),
        )
        ttl_s = self._pipeline.settings.job_ttl_s + KEPT_AFTER_EXPIRY_S
        return NewJob(job, request, int(ttl_s * 1000))

    async def get(self, jid: str, caller: Caller, wait_s: float = 0.0) -> dict[str, Any]:
        """Return a job; with `wait_s`, wait up to that many seconds for its end. Raises NotFound."""
        job = await self.load(jid, caller)
        facts = await self.facts(job)
        if wait_s > 0 and state_of(facts)[0] in ("queued", "running"):
            await self.wait_ended(job, wait_s)
            facts = await self.facts(job)
        return await self._view(job, facts, whole=True)

    async def wait_ended(self, job: m.Job, wait_s: float) -> None:
        """Wait up to `wait_s` seconds until a job has ended."""
        with suppress(TimeoutError):
            async with asyncio.timeout(min(wait_s, MAX_WAIT_S)):
                await self.readers.end(job.jid, job.tenant, partial(self._wait, job))

    async def _wait(self, job: m.Job, pause_s: Callable[[], float]) -> None:
        """Wait until a job has ended, checking a few requests at a time, however many it has."""
        running = deque(job.rids)
        while running:
            rids = [running.popleft() for _ in range(min(_AT_ONCE, len(running)))]
            facts = await self._bus.requests(rids)
            if state_of(facts)[0] not in ("queued", "running", "completed"):
                return
            running += [rid for rid, fact in zip(rids, facts, strict=True) if fact and not fact.is_terminal]
            if not all(fact and fact.is_terminal for fact in facts):
                await asyncio.sleep(pause_s())

    async def cancel(self, jid: str, caller: Caller) -> dict[str, Any]:
        """Cancel a job's running requests and return the job. Raises NotFound."""
        job = await self.load(jid, caller)
        await asyncio.gather(*(self._bus.cancel(rid) for rid in job.rids))
        return await self._view(job, await self.facts(job), whole=True)

    async def delete(self, jid: str, caller: Caller) -> dict[str, Any]:
        """Delete a job with its requests, cancelling running ones, and free its storage. Raises NotFound."""
        await self.forget(await self.load(jid, caller))
        return {"id": jid, "object": "job", "deleted": True}

    async def forget(self, job: m.Job) -> None:
        """Delete a job with its requests, cancelling running ones."""
        await self.before_forget(job)
        await asyncio.gather(*(self._bus.finish(rid, "cancelled", "cancelled") for rid in job.rids))
        settings = self._pipeline.settings
        text_ms = int(1000 * settings.history_s) if settings.history_text else 0
        await self._bus.jobs.forget(job, text_ms)

    async def list(
        self, caller: Caller, status: JobStatus | None, limit: int, after: str | None, model: str | None = None
    ) -> dict[str, Any]:
        """Return the caller's jobs, newest first, without bodies and results. Raises NotFound when `after` is unknown.

        status, model: filters. A page ends when its cost is reached: it may be shorter than `limit`, even empty,
        although there are more (`has_more`). `last_id` is the cursor of the next page.
        """
        start = 0
        if after is not None:
            rank = await self._bus.jobs.rank(caller.owner, after)
            if rank is None:
                raise NotFound(f"there is no job {after}", param="after")
            start = rank + 1
        page: list[dict[str, Any]] = []
        last, cost = None, 0
        while len(page) < limit and cost < MAX_PAGE_COST:
            jids = await self._bus.jobs.newest(caller.owner, start, min(_AT_ONCE, limit - len(page)))
            if not jids:
                break
            for job, facts in await self._load_many(jids):
                of_job = len(m.encode(job)) + _LOOK_UP_COST * (1 + len(job.rids))
                cost += of_job
                reads.owe(of_job / reads.BYTES_PER_READ)
                view = await self._view(job, facts, whole=False)
                if status in (None, view["status"]) and model in (None, job.model):
                    page.append(view)
            start, last = start + len(jids), jids[-1]
        more = await self._bus.jobs.newest(caller.owner, start, 1)
        return list_page(page, has_more=bool(more), last_id=last)

    # ------------------------------------------------------------ storage

    async def load(self, jid: str, caller: Caller) -> m.Job:
        """Return a job of the caller. Raises NotFound."""
        job = await self._bus.jobs.get(jid)
        if job is None or job.tenant != caller.owner:
            raise NotFound(f"there is no job {jid}", code="job_not_found")
        return job

    async def _load_many(self, jids: Sequence[str]) -> list[tuple[m.Job, Facts]]:
        jobs = await self._bus.jobs.get_many(jids)
        facts = iter(await self._bus.requests([rid for job in jobs for rid in job.rids]))
        return [(job, [next(facts) for _ in job.rids]) for job in jobs]

    def _generates(self, job: m.Job) -> bool:
        return self._apis[job.endpoint].generates

    async def facts(self, job: m.Job) -> Facts:
        """Return the queue's facts about a job's requests, None for expired ones."""
        return await self._bus.requests(job.rids)

    # ------------------------------------------------------------ views

    async def _view(self, job: m.Job, facts: Facts, *, whole: bool) -> dict[str, Any]:
        state, error = state_of(facts)
        known = [fact for fact in facts if fact is not None]
        is_terminal = state not in ("queued", "running")
        view = {
            "id": job.jid,
            "object": "job",
            "status": state,
            "endpoint": job.endpoint,
            "model": job.model,
            "created_at": job.created_ms // 1000,
            "started_at": _seconds(min((fact.first_ms for fact in known if fact.first_ms), default=0)),
            "completed_at": _seconds(max((fact.ended_ms for fact in known), default=job.created_ms))
            if is_terminal
            else None,
            "expires_at": job.expires_ms // 1000,
            **(await self._outlook(job, facts) if whole else {}),
            "attempts": max((fact.attempts for fact in known), default=0),
            "tokens_generated": sum(fact.num_output_tokens for fact in known) if self._generates(job) else 0,
            "error": error,
            "metadata": job.metadata,
        }
        if whole:
            view["result"] = await self._result(job, facts) if state == "completed" else None
        return view

    async def _outlook(self, job: m.Job, facts: Facts) -> dict[str, Any]:
        """Return the queue position, estimated start and blocking reason of a job without tokens."""
        rid = next((rid for rid, fact in zip(job.rids, facts, strict=True) if fact and not fact.is_terminal), "")
        if not rid or state_of(facts)[0] != "queued":
            return {"position": None, "estimated_start_at": None, "waiting_for": None}
        position, status = await self._bus.position(rid), self._pipeline.fleet.status
        drain_rate = status.drain_rate if status is not None else 0.0
        wait_s = position / drain_rate if position is not None and drain_rate else None
        return {
            "position": position,
            "estimated_start_at": None if wait_s is None else int(now_ms() / 1000 + wait_s),
            "waiting_for": await waiting_state(self._bus, rid),
        }

    async def request(self, job: m.Job, *, keep: bool = False) -> Any:
        """Return the stored part of a job's body, and charge for it.

        keep: it is needed until the current call's end, and then freed in a thread. Raises NotFound, UnreadableRecord,
        and as `cost.hold` and `reads.spend`.
        """
        request = await self._bus.jobs.request(job.jid)
        if request is None:
            raise NotFound("the result has expired", code="result_expired")
        reads.spend(len(request) / reads.KEPT_BYTES_PER_READ)
        apart = partial(self._pipeline.checks.do, fields=(), num_bytes=len(request), tenant=job.tenant)
        hold(held() + len(request) + await apart(partial(values_bytes, request)))
        with as_kept(f"what {job.jid} asked for"):
            value = await apart(partial(loads_kept, request))
        if keep:
            large.keep(value, len(request))
        return value

    async def call(self, job: m.Job, facts: Facts, request: Any) -> tuple[JobApi, SubmittedCall]:
        """Rebuild a job's call as submitted, and charge for its memory and for reading its answer.

        request: the stored part of its body. Raises NotFound, UnreadableRecord, and as `cost.hold` and `reads.spend`.
        """
        reads.spend(sum(fact.num_output_tokens for fact in facts if fact is not None) / reads.TOKENS_PER_READ)
        api = self._apis[job.endpoint]
        with as_kept(f"what {job.jid} asked for"):
            tools = request.get("tools") or request.get("shown", {}).get("tools")  # slow to parse
            num_bytes = len(orjson.dumps(tools)) if tools else 0
            parsed = await self._pipeline.checks.do(
                partial(api.parse, request, EVERYBODY), ("tools",), num_bytes, job.tenant
            )
        call = await self._pipeline.earlier.known(parsed, job, facts)
        hold(held() + self._pipeline.earlier.num_bytes(call))
        return api, call

    async def stream(self, jid: str, caller: Caller, event_id: str) -> JobStream:
        """Return a job's answer as a stream, after the event with the given id, "" for all.

        Raises NotFound, BadRequest.
        """
        job = await self.load(jid, caller)
        if not self._generates(job):
            raise BadRequest(f"the answer of {job.endpoint} is not streamed: GET /v1/jobs/{jid} returns it")
        return JobStream(self.readers, jid, job.tenant, partial(self._events, job), partial(numbers_of, event_id))

    async def _events(self, job: m.Job) -> JobEvents:
        """Return a job's events from the first on. Raises NotFound, BadRequest, and as `cost.hold`."""
        api, call = await self.call(job, await self.facts(job), await self.request(job))
        options = call.parsed.options
        if options.by_token:
            raise BadRequest(f"the stream of {job.jid} is at {job.endpoint}/{job.jid}?stream=true")
        if 0 < options.num_best < options.n:
            raise BadRequest("best_of cannot be streamed: the best choices are known only when all have ended")
        choices = choices_of(call)
        hold(held() + first_event_bytes(options, call.prompts))
        return JobEvents(self._bus, choices, api.writer(call, choices))

    async def _result(self, job: m.Job, facts: Facts) -> dict[str, Any]:
        """Return the object that the endpoint would have returned. Raises NotFound."""
        api, call = await self.call(job, facts, await self.request(job))
        choices = choices_of(call)
        writer = api.writer(call, choices)
        pieces = await self.read(choices, writer)
        return writer.whole(best_of(pieces, call.parsed.options), usage_of(choices))

    async def read(self, choices: Sequence[Choice], writer: Writer) -> list[Piece]:
        """Return the choices of an ended job. Raises NotFound, and the error that ended a request.

        writer: also receives the tokens if each is a piece of its own.
        """
        prompts = list({id(choice.prompt): choice.prompt for choice in choices}.values())
        growth, expired = TextGrowth(choices[0].options, prompts), "the result has expired"
        pieces: list[Piece] = []
        for choice in choices:
            if choice.needs_prompt:
                found = await self._bus.prompt_logprobs(choice.rid, choice.options.prompt_record_bytes)
                if found is None:
                    raise NotFound(expired, code="result_expired")
                choice.give_prompt(*found)
            whole, turn = Piece(choice.index), LoopSlice()
            while not choice.cursor.ended:
                delta = await self._bus.read_log(choice.rid, choice.cursor.next, choice.record_bytes, log_limit(choice))
                if delta is None or not (delta.ids or delta.finish):
                    raise NotFound(expired, code="result_expired")
                for one in tokens_of(delta, choice.record_bytes) if choice.options.by_token else [delta]:
                    piece = Piece(choice.index)
                    choice.take(one, piece)
                    growth.add(piece.text)
                    if choice.options.by_token:
                        writer.frames(piece)
                    whole.add(piece)
                    await turn.pause()
            pieces.append(whole)
        return pieces


def state_of(facts: Facts) -> tuple[JobStatus, dict[str, Any] | None]:
    """Return a job's state and error; it is failed or cancelled as soon as one of its requests is."""
    if any(fact is None for fact in facts):
        return "expired", None
    known = [fact for fact in facts if fact is not None]
    for fact in known:
        if fact.state == "failed":
            error = error_from(fact.error)
            fields = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
            return "failed", fields
    if any(fact.state == "cancelled" for fact in known):
        return "cancelled", None
    if all(fact.is_terminal for fact in known):
        return "completed", None
    return "queued" if all(fact.state == "queued" and not fact.num_output_tokens for fact in known) else "running", None


async def _do_nothing(job: m.Job) -> None:
    """Do nothing: the default of `Jobs.before_forget`."""


def _seconds(ms: int) -> int | None:
    return ms // 1000 if ms else None
