"""Background jobs: calls that outlive their client. Any gateway can show any job, from what the queue holds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import orjson

from gateway.auth.callers import EVERYBODY, Caller
from gateway.calls.admit import AdmittedCall
from gateway.calls.choices import Choice, Piece, best_of
from gateway.calls.earlier import check_same_body
from gateway.calls.follow import choices_of
from gateway.calls.parse import ParsedCall, Sent
from gateway.calls.pipeline import Pipeline
from gateway.calls.submit import SubmittedCall, facts_of
from gateway.calls.writers import Usage, Writer
from protocol.queue.bus import RequestFacts
from protocol.wire import messages as m
from protocol.wire.error_codec import error_from
from protocol.wire.errors import LorafleetError, NotFound

ID_PREFIX = "job_"
POLL_S = 0.2
MAX_WAIT_S = 120.0
KEPT_AFTER_EXPIRY_S = 3600
_PAGE = 100

JobStatus = Literal["queued", "running", "completed", "failed", "cancelled", "expired"]
Facts = Sequence[RequestFacts | None]


@dataclass(frozen=True, slots=True)
class JobApi:
    """The first and the last stage of an endpoint whose calls may run in the background."""

    parse: Callable[[Mapping[str, Any], Caller], ParsedCall]  # of a body as JSON
    writer: Callable[[SubmittedCall, Sequence[Choice]], Writer]


class Jobs:
    """The jobs of the fleet."""

    def __init__(self, pipeline: Pipeline, apis: Mapping[str, JobApi]) -> None:
        """apis: by endpoint."""
        self._pipeline = pipeline
        self._bus = pipeline.bus
        self._apis = apis

    async def create(self, call: AdmittedCall, sent: Sent) -> dict[str, Any]:
        """Submit a call as a job and return it. Raises Overloaded."""
        submitter, ttl_s = self._pipeline.submitter, self._pipeline.settings.job_ttl_s
        made, caller = submitter.made(call), call.parsed.caller
        job = m.Job(
            jid=ID_PREFIX + made.id,
            endpoint=sent.endpoint,
            tenant=caller.owner,
            model=call.parsed.model_name,
            created_ms=made.created_ms,
            expires_ms=made.deadline_ms,
            rids=made.rids,
            request={key: value for key, value in orjson.loads(sent.raw).items() if key != "api_token"},  # never kept
            metadata=dict(call.parsed.metadata),
            **facts_of(made),
        )
        # Before the requests: an accepted request without its job could never be found.
        await self._save(job, ttl_s)
        record = None
        if sent.key:
            record = m.Idempotent(body_hash=sent.hash, created_ms=job.created_ms, rids=job.rids, jid=job.jid)
        try:
            requests = submitter.requests(made, gateway="", stored=True)
            earlier = await submitter.put(call, requests, record)
        except LorafleetError:
            await self._forget(job)
            raise
        if earlier is not None:
            await self._forget(job)
            check_same_body(earlier, sent)
            if not await self.knows(earlier):
                known = msgspec.structs.replace(job, jid=earlier.jid, created_ms=earlier.created_ms, rids=earlier.rids)
                await self._save(known, ttl_s)
            return await self.get(earlier.jid, caller)
        # And again after them: a queue that lost its last second in between may have lost the job alone.
        await self._save(job, ttl_s)
        return await self._view(job, await self._facts(job), whole=True)

    async def knows(self, record: m.Idempotent) -> bool:
        """Return whether the job of an Idempotency-Key exists; a queue that lost its last second may have lost it."""
        return await self._bus.jobs.exists(record.jid)

    async def get(self, jid: str, caller: Caller, wait_s: float = 0.0) -> dict[str, Any]:
        """Return a job; with `wait_s`, wait at most so long until it has ended. Raises NotFound."""
        job = await self._load(jid, caller)
        deadline_s = time.monotonic() + min(wait_s, MAX_WAIT_S)
        while True:
            facts = await self._facts(job)
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or state_of(facts)[0] not in ("queued", "running"):
                return await self._view(job, facts, whole=True)
            await asyncio.sleep(min(POLL_S, left_s))

    async def cancel(self, jid: str, caller: Caller) -> dict[str, Any]:
        """Cancel what still runs of a job and return it. Raises NotFound."""
        job = await self._load(jid, caller)
        await asyncio.gather(*(self._bus.cancel(rid) for rid in job.rids))
        return await self._view(job, await self._facts(job), whole=True)

    async def list(self, caller: Caller, status: JobStatus | None, limit: int, after: str | None) -> dict[str, Any]:
        """Return the caller's jobs, newest first, without results. Raises NotFound when `after` is unknown."""
        start = 0
        if after is not None:
            rank = await self._bus.jobs.rank(caller.owner, after)
            if rank is None:
                raise NotFound(f"there is no job {after}", param="after")
            start = rank + 1
        found: list[dict[str, Any]] = []
        while len(found) <= limit:
            jids = await self._bus.jobs.newest(caller.owner, start, _PAGE)
            if not jids:
                break
            start += _PAGE
            for job, facts in await self._load_many(jids):
                view = await self._view(job, facts, whole=False)
                if status is None or view["status"] == status:
                    found.append(view)
        page = found[:limit]
        return {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(found) > limit,
        }

    # ------------------------------------------------------------ storage

    async def _save(self, job: m.Job, ttl_s: float) -> None:
        await self._bus.jobs.save(job, int((ttl_s + KEPT_AFTER_EXPIRY_S) * 1000))

    async def _forget(self, job: m.Job) -> None:
        await self._bus.jobs.forget(job)

    async def _load(self, jid: str, caller: Caller) -> m.Job:
        job = await self._bus.jobs.get(jid)
        if job is None or job.tenant != caller.owner:
            raise NotFound(f"there is no job {jid}", code="job_not_found")
        return job

    async def _load_many(self, jids: Sequence[str]) -> list[tuple[m.Job, Facts]]:
        jobs = await self._bus.jobs.get_many(jids)
        facts = iter(await self._bus.requests([rid for job in jobs for rid in job.rids]))
        return [(job, [next(facts) for _ in job.rids]) for job in jobs]

    async def _facts(self, job: m.Job) -> Facts:
        return await self._bus.requests(job.rids)

    # ------------------------------------------------------------ what the client sees

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
            "position": await self._position(job, facts) if state == "queued" and whole else None,
            "attempts": max((fact.attempts for fact in known), default=0),
            "tokens_generated": sum(fact.num_output_tokens for fact in known),
            "error": error,
            "metadata": job.metadata,
        }
        if whole:
            view["result"] = await self._result(job, facts) if state == "completed" else None
        return view

    async def _position(self, job: m.Job, facts: Facts) -> int | None:
        """Return how many requests wait ahead of the job's first waiting one."""
        for rid, fact in zip(job.rids, facts, strict=True):
            if fact is not None and fact.state == "queued":
                return await self._bus.position(rid)
        return None

    async def _result(self, job: m.Job, facts: Facts) -> dict[str, Any]:
        """Return the completion object that the endpoint would have answered."""
        api = self._apis[job.endpoint]
        call = await self._pipeline.earlier.known(api.parse(job.request, EVERYBODY), job, facts)
        usage = Usage(prompt_tokens=sum(prompt.num_tokens for prompt in call.prompts))
        pieces: list[Piece] = []
        choices = choices_of(call)
        for choice in choices:
            delta = await self._bus.read_log(choice.rid, 0, choice.record_bytes)
            if delta is None:
                raise NotFound("the result has expired", code="result_expired")
            if choice.needs_prompt:
                found = await self._bus.prompt_logprobs(choice.rid)
                if found is None:
                    raise NotFound("the result has expired", code="result_expired")
                choice.give_prompt(*found)
            piece = Piece(choice.index)
            choice.take(delta, piece)
            pieces.append(piece)
            usage.completion_tokens += choice.num_output_tokens
        return api.writer(call, choices).whole(best_of(pieces, call.parsed.options), usage)


def state_of(facts: Facts) -> tuple[JobStatus, dict[str, Any] | None]:
    """Return a job's state and error; it has failed, or is cancelled, as soon as one of its requests has or is."""
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


def _seconds(ms: int) -> int | None:
    return ms // 1000 if ms else None
