"""The assigned requests of each worker, and what each tenant has been charged for them. Pure.

An entry begins with an assignment. It ends with the worker's `Ended` message, with a newer epoch of the request, or
with the worker's removal. In between, heartbeats report the progress of each request.
"""

from __future__ import annotations

from collections.abc import Callable

from protocol.wire.keys import BATCH
from scheduler.fairness import VirtualTokenCounters
from scheduler.request import BASE, QueuedRequest, decrement
from scheduler.workers import Tier, Worker, Workers

OUTPUT_SMOOTHING = 0.02
"""Weight of the latest request in the moving average of output lengths."""


class Ledger:
    """Assigned requests. Updates the counts of each `Worker` and charges tenants as tokens are computed."""

    def __init__(self, workers: Workers, counters: VirtualTokenCounters, rank_of: Callable[[str], int]) -> None:
        self._workers = workers
        self._counters = counters
        self._rank_of = rank_of
        self.mean_output_tokens = 128.0
        self.num_ended = 0

    def expected_tokens(self, request: QueuedRequest) -> int:
        """Return the tokens of a request's prefill plus its expected output."""
        sub = request.submit
        return sub.num_prefill_tokens + min(sub.max_new_tokens, round(self.mean_output_tokens))

    def assign(self, request: QueuedRequest, worker: Worker) -> None:
        """Enter a request as assigned to a worker, and charge its prefill if that was not charged yet."""
        sub = request.submit
        request.wid, request.started, request.held_since_ms = worker.wid, False, -1.0
        request.start_tokens = -1 if request.resumed or request.output_charged else 0
        request.ready = worker.tier(sub.digest) is Tier.RESIDENT
        request.reserved_tokens = self.expected_tokens(request)
        worker.requests[request.rid] = request
        self._workers.num_assigned += 1
        if not worker.by_digest[sub.digest] and sub.digest != BASE:
            worker.ranks[sub.digest] = self._rank_of(sub.digest)
            worker.rank_sum += worker.ranks[sub.digest]
        worker.by_digest[sub.digest] += 1
        worker.num_tokens += request.reserved_tokens
        worker.num_yielding += request.yields
        if request.ready:
            worker.num_ready += 1
            worker.num_ready_yielding += request.yields
            worker.num_ready_batch += request.submit.cls == BATCH
        else:
            worker.cold[sub.digest] += 1
        if request.attempts:
            worker.suspects[request.attempts] += 1
        if not request.input_charged:
            request.input_charged = True
            self._counters.charge(sub.tenant, sub.num_prefill_tokens, 0, sub.weight)

    def remove(self, request: QueuedRequest) -> None:
        """Remove a request from its worker."""
        worker = self._workers.by_id.get(request.wid)
        request.wid = ""
        if worker is None or worker.requests.get(request.rid) is not request:
            return
        digest = request.submit.digest
        del worker.requests[request.rid]
        self._workers.num_assigned -= 1
        decrement(worker.by_digest, digest)
        if digest in worker.ranks and digest not in worker.by_digest:
            worker.rank_sum -= worker.ranks.pop(digest)
        worker.num_tokens -= request.reserved_tokens
        worker.num_yielding -= request.yields
        if request.ready:
            worker.num_ready -= 1
            worker.num_ready_yielding -= request.yields
            worker.num_ready_batch -= request.submit.cls == BATCH
        else:
            decrement(worker.cold, digest)
        if request.attempts and not request.started:
            decrement(worker.suspects, request.attempts)

    def end(self, request: QueuedRequest, num_output_tokens: int) -> None:
        """Charge and remove a request that has ended on its worker."""
        worker = self._workers.by_id.get(request.wid)
        if worker is not None and not request.ready and num_output_tokens > max(request.start_tokens, 0):
            self._workers.note_resident(worker, request.submit.digest)
        self.hand_back(request, num_output_tokens)
        self.mean_output_tokens += OUTPUT_SMOOTHING * (num_output_tokens - self.mean_output_tokens)
        self.num_ended += 1

    def hand_back(self, request: QueuedRequest, num_output_tokens: int) -> None:
        """Charge and remove a request that its worker handed back."""
        self._charge(request, num_output_tokens)
        self.remove(request)

    def observe(self, worker: Worker) -> None:
        """Process a worker's new heartbeat: the progress of its requests, and adapters that have become resident."""
        for rid, num_output_tokens in worker.beat.progress:
            request = worker.requests.get(rid)
            if request is not None:
                self._progress(worker, request, num_output_tokens)
        if not worker.cold:
            return
        for digest in [digest for digest in worker.cold if digest in worker.resident]:
            for request in worker.requests.values():
                if request.submit.digest == digest:
                    self._make_ready(worker, request)

    def _charge(self, request: QueuedRequest, num_output_tokens: int) -> None:
        """Charge the output of a request up to `num_output_tokens`, the length of its log."""
        sub = request.submit
        if request.output_charged < 0:
            request.output_charged = num_output_tokens
        elif num_output_tokens > request.output_charged:
            self._counters.charge(sub.tenant, 0, num_output_tokens - request.output_charged, sub.weight)
            request.output_charged = num_output_tokens

    def _progress(self, worker: Worker, request: QueuedRequest, num_output_tokens: int) -> None:
        self._charge(request, num_output_tokens)
        if request.start_tokens < 0:
            request.start_tokens = num_output_tokens
        elif num_output_tokens > request.start_tokens and not request.started:
            request.started = True
            if request.attempts:
                decrement(worker.suspects, request.attempts)
            self._make_ready(worker, request)

    def _make_ready(self, worker: Worker, request: QueuedRequest) -> None:
        if not request.ready:
            request.ready = True
            worker.num_ready += 1
            worker.num_ready_yielding += request.yields
            worker.num_ready_batch += request.submit.cls == BATCH
            decrement(worker.cold, request.submit.digest)
