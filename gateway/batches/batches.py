"""Operations of clients on batches: create, get, list, cancel."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from gateway.auth.callers import Caller
from gateway.batches.batch_bodies import BatchRequest
from gateway.files.files import FileService
from gateway.http.list_page import list_page
from gateway.http.paths import BATCH_ENDPOINTS
from protocol.queue.bus import Bus, now_ms
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.brief import brief
from protocol.wire.errors import BadRequest, Conflict, NotFound, Overloaded

ID_PREFIX = "batch_"
WINDOWS = {"24h": 86_400}
"""`completion_window` -> seconds."""

_RETRY_S = 60.0  # Retry-After, in seconds, at the limit of unfinished batches


class BatchService:
    """The batches of the fleet."""

    def __init__(self, bus: Bus, files: FileService, settings: Settings) -> None:
        self._bus = bus
        self._files = files
        self._settings = settings

    async def create(self, request: BatchRequest, caller: Caller) -> dict[str, Any]:
        """Create a batch. Its lines are checked later. Raises BadRequest, Overloaded."""
        if request.endpoint not in BATCH_ENDPOINTS:
            text = f"endpoint is {brief(request.endpoint)}; batches support {', '.join(sorted(BATCH_ENDPOINTS))}"
            raise BadRequest(text, param="endpoint")
        if request.completion_window not in WINDOWS:
            text = f"completion_window is {brief(request.completion_window)}; it must be {', '.join(WINDOWS)}"
            raise BadRequest(text, param="completion_window")
        expiry = request.output_expires_after
        if expiry is not None and expiry.seconds > self._settings.file_ttl_s:
            text = f"output_expires_after.seconds is {expiry.seconds}; the limit is {self._settings.file_ttl_s:.0f}"
            raise BadRequest(text, param="output_expires_after.seconds")
        try:
            source = await self._files.get(request.input_file_id, caller)
        except NotFound as error:
            raise BadRequest(error.message, param="input_file_id", code="file_not_found") from error
        if source.purpose != "batch":
            text = f"file {source.id} has the purpose {source.purpose}; an input file has batch"
            raise BadRequest(text, param="input_file_id")
        created_ms, window_s = now_ms(), WINDOWS[request.completion_window]
        batch = m.Batch(
            id=f"{ID_PREFIX}{created_ms:012x}{secrets.token_hex(8)}",
            tenant=caller.owner,
            endpoint=request.endpoint,
            input_file=source.id,
            created_ms=created_ms,
            expires_ms=created_ms + window_s * 1000,
            window=request.completion_window,
            metadata=request.metadata,
            output_life_s=expiry.seconds if expiry is not None else 0,
        )
        ttl_ms = int((self._settings.file_ttl_s + window_s) * 1000)
        num_open = await self._bus.batches.open(batch, ttl_ms=ttl_ms, max_open=self._settings.tenant_batches)
        if num_open >= 0:
            text = f"{num_open} batches are unfinished; the limit is {self._settings.tenant_batches}"
            raise Overloaded(text, _RETRY_S)
        return view(batch)

    async def get(self, batch_id: str, caller: Caller) -> m.Batch:
        """Return a batch. Raises NotFound."""
        batch = await self._bus.batches.get(batch_id, caller.owner)
        if batch is None:
            raise NotFound(f"there is no batch {brief(batch_id)}", param="batch_id", code="batch_not_found")
        return batch

    async def cancel(self, batch_id: str, caller: Caller) -> m.Batch:
        """Request the cancellation of a batch; return it. Idempotent. Raises NotFound, Conflict."""
        batch = await self.get(batch_id, caller)
        if batch.status in m.ENDED_BATCH and batch.status != "cancelled":
            raise Conflict(f"batch {batch_id} is {batch.status}: it can no longer be cancelled")
        if batch.status not in m.ENDED_BATCH:
            await self._bus.batches.cancel(batch_id)
        return await self.get(batch_id, caller)

    async def list(self, caller: Caller, limit: int, after: str | None) -> dict[str, Any]:
        """Return a page of the caller's batches, newest first. Raises NotFound when `after` is unknown."""
        batches, start = self._bus.batches, 0
        if after is not None:
            rank = await batches.rank(caller.owner, after)
            if rank is None:
                raise NotFound(f"there is no batch {brief(after)}", param="after")
            start = rank + 1
        ids = await batches.newest(caller.owner, start, limit + 1)
        page = [view(batch) for batch in await batches.get_many(ids[:limit])]
        return list_page(page, has_more=len(ids) > limit)


def view(batch: m.Batch) -> dict[str, Any]:
    """Return a batch as OpenAI's object."""
    usage, ended = batch.usage, _seconds(batch.ended_ms)
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model or None,
        "errors": {"object": "list", "data": [_problem(one) for one in batch.problems]} if batch.problems else None,
        "input_file_id": batch.input_file,
        "completion_window": batch.window,
        "status": batch.status,
        "output_file_id": batch.output_file or None,
        "error_file_id": batch.error_file or None,
        "created_at": batch.created_ms // 1000,
        "in_progress_at": _seconds(batch.in_progress_ms),
        "expires_at": batch.expires_ms // 1000,
        "finalizing_at": _seconds(batch.finalizing_ms),
        "completed_at": ended if batch.status == "completed" else None,
        "failed_at": ended if batch.status == "failed" else None,
        "expired_at": ended if batch.status == "expired" else None,
        "cancelling_at": _seconds(batch.cancelling_ms),
        "cancelled_at": ended if batch.status == "cancelled" else None,
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "usage": {
            "input_tokens": usage.input_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.output_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.input_tokens + usage.output_tokens,
        },
        "metadata": batch.metadata,
    }


def _problem(problem: m.BatchProblem) -> Mapping[str, Any]:
    return {"code": problem.code, "message": problem.message, "line": problem.line, "param": problem.param}


def _seconds(ms: int) -> int | None:
    return ms // 1000 if ms else None
