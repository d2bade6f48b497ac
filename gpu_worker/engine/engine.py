"""The engine of a model that generates text: accepts requests, computes one `step` at a time, returns tokens.

Used by one thread only; see `engine_thread.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_worker.adapters.cache import AdapterCache
from gpu_worker.engine.base import BaseEngine
from gpu_worker.engine.binding import RequestBinder
from gpu_worker.engine.decoding import accept_tokens, check_choice, grammar_masks, sample_rows, without
from gpu_worker.engine.flight import Flight, Launched
from gpu_worker.engine.one_by_one import OneByOneRunner
from gpu_worker.engine.pooled import outputs_of
from gpu_worker.engine.runner import Runner, StepInputs
from gpu_worker.engine.step_model import StepWork
from gpu_worker.memory import Arriving
from gpu_worker.model.model import BaseModel
from gpu_worker.planning.batcher import Batcher, DraftSource
from gpu_worker.planning.blocks import BlockPool
from gpu_worker.planning.policy import BatchLimits
from gpu_worker.planning.request import EngineRequest, TokenOutput, failure_of
from gpu_worker.planning.sequence import Sequence
from gpu_worker.planning.states import StatePool
from gpu_worker.planning.step_plan import StepPlan
from gpu_worker.sampling.grammars import Grammars
from gpu_worker.sampling.logprobs import record_prompts
from gpu_worker.sampling.sampling import Sampled, begin_sample
from protocol.wire import messages as m
from protocol.wire.errors import LorafleetError, Unavailable
from protocol.wire.tokens import TokenTable

logger = logging.getLogger(__name__)

MASK_WAIT_S = 0.01
"""Minimum seconds that a step waits for masks; `MASK_WAIT_SHARE` is the minimum as a share of its time so far."""

MASK_WAIT_SHARE = 0.25

YIELDING_MASK_WAIT_S = 0.001
"""Maximum seconds that a limited step waits if its masks are all for sequences that yield, which may not delay it."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes of one engine, checked against each other."""

    limits: BatchLimits
    num_blocks: int
    max_model_len: int  # tokens of prompt and output of one request
    num_states: int = 0  # slots for the states of layers that keep states
    kv_bytes: int = 0  # size of all blocks
    max_mask_s: float = 30.0  # maximum CPU seconds for the masks of one request with a grammar
    overlaps: bool = False  # whether a step is launched before the previous one's tokens are known

    def __post_init__(self) -> None:
        """Raise ValueError for sizes that contradict each other."""
        if self.overlaps and self.limits.max_draft_tokens:
            raise ValueError("with draft tokens, a sequence's next position is known only with its tokens")


class Engine(BaseEngine):
    """Runs requests for any mix of adapters together, step by step."""

    def __init__(
        self,
        model: BaseModel,
        config: EngineConfig,
        adapters: AdapterCache,
        tokens: TokenTable | None = None,
        tokenizer: str | None = None,
        draft_model: DraftSource | None = None,
    ) -> None:
        """Allocate the KV cache and check the model. Raises BadRequest for a model that the engine computes wrongly.

        tokens, tokenizer: the model's token table and tokenizer.json, None without a tokenizer.
        """
        super().__init__(adapters)
        limits = config.limits
        self.model = model
        self.config = config
        if model.passes is None:
            self.runner = Runner(model, config.num_blocks, adapters.extras, config.num_states)
        else:
            self.runner = OneByOneRunner(model, model.passes, config.num_blocks, adapters.extras)
        self.runner.check()
        self.blocks = BlockPool(config.num_blocks)
        mixers = model.mixers
        states = StatePool(config.num_states, saves_outputs=not mixers.tells_prompts_apart) if mixers.calls else None
        self.batcher = Batcher(limits, self.blocks, adapters, model.fingerprint, states, draft_model)
        self.grammars = Grammars(model.vocab_size, model.eos_ids, config.max_mask_s, tokens, tokenizer)
        self._binder = RequestBinder(
            model,
            adapters,
            self.grammars,
            tokens,
            max_model_len=config.max_model_len,
            max_draft_tokens=limits.max_draft_tokens,
        )
        self._seqs: dict[str, Sequence] = {}  # by request id
        self._flight: Flight | None = None  # the step whose tokens have not reached the host yet

    def finish_start(self) -> None:
        """Prepare what grammars need, which holds the GIL for up to half a second; see `BaseEngine`."""
        self.grammars.prepare()
        super().finish_start()

    def extend_memory(self) -> bool:
        """Have memory of keys and values, or else of adapters, provided ahead of use; see `BaseEngine`."""
        return self.runner.ahead.extend(self.blocks.num_ever_used) or super().extend_memory()

    # ------------------------------------------------------------ a step

    def step(self) -> list[TokenOutput]:
        """Compute one batch. Return the outputs of requests that received a token or ended.

        With overlap, these are the tokens of the previous batch: this batch's are still being computed.
        """
        self.meter.start()
        self._receive()
        plan = self._plan()
        has_work = bool(plan.num_new)
        launched = self._launch(plan) if has_work else None
        has_landed = self._land(plan)
        if launched is not None:
            self._flight = self._choose(launched)
        if has_work and self._flight is None:
            self._make_room(plan)
        if not self.config.overlaps:
            self._land(None)
        self.can_step = self._flight is not None or ((has_work or has_landed) and bool(self._seqs))
        return self._put_out()

    def _receive(self) -> None:
        """Take the adapters and grammars that have finished loading, and bind the requests that waited for them."""
        self._collect_adapters()
        for seq in [seq for seq in self.batcher.waiting if not seq.is_bound]:
            if seq.request.digest and not self.adapters.is_resident(seq.request.digest):
                continue
            try:
                finish = self._binder.bind(seq)
            except BaseException as error:  # noqa: BLE001  a request's edge: it fails alone
                self._fail_waiting(seq.rid, failure_of(seq.request, error))
                continue
            if finish:
                self._outputs.append(seq.put_out([], finish))
                self._drop(seq.rid)

    def _plan(self) -> StepPlan:
        """Choose the step's tokens, then the adapters to load for later steps."""
        plan = self.batcher.plan()
        if self.batcher.draft_model is not None:
            self.meter.set_aside(self.batcher.draft_model.take_seconds())
        self.timelines.begin(seq.rid for seq in plan.num_new)
        self.timelines.preempt(seq.rid for seq in plan.preempted)
        self._request_adapters()
        return plan

    def _launch(self, plan: StepPlan) -> Launched | None:
        """Launch a step's forward pass. Return None if the device has no memory for it.

        Input tokens that the step in flight is still choosing are copied on the device.
        """
        work = self._work_of(plan)
        self.meter.lap("plan")
        try:
            inputs = self.runner.prepare(plan, self._flight.ids if self._flight is not None else None)
            self.meter.lap("inputs")
            logits = self._run(inputs, plan)
            self.meter.lap("forward")
        except torch.OutOfMemoryError as error:
            _log_no_memory(plan, error)
            return None
        return Launched(plan, work, inputs, logits, self.meter.started_s)

    def _run(self, inputs: StepInputs, plan: StepPlan) -> Tensor:
        """Return the logits of a step; a head of the base, if any, stores the hidden states."""
        source = self.batcher.draft_model
        if source is None:
            return self.runner.run(inputs)
        with source.watching(plan):
            logits = self.runner.run(inputs)
        self.meter.set_aside(source.take_seconds())
        return logits

    def _land(self, behind: StepPlan | None) -> bool:
        """Wait for the tokens of the step in flight, if any, and settle them. Return whether there was one.

        behind: the step launched after it, from which sequences that end here are removed.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return False
        sampled = flight.wait()
        self.meter.lap("sample")
        num_output = self._settle(flight, sampled)
        if behind is not None:
            for seq in [seq for seq in behind.num_new if not self._holds(seq)]:
                self.batcher.leave(seq, behind)
        self.meter.lap("finish")
        self._count(flight, num_output)
        return True

    def _choose(self, launched: Launched) -> Flight | None:
        """Launch the sampling of a step's tokens. Return None if the device has no memory for it."""
        try:
            flight = self._sample(launched)
        except torch.OutOfMemoryError as error:
            _log_no_memory(launched.plan, error)
            return None
        if self.config.overlaps:
            for row, seq in enumerate(flight.ready):  # there are no drafts: each sequence has one row
                seq.expect(row)
        self.meter.lap("sample")
        return flight

    def _holds(self, seq: Sequence) -> bool:
        """Return whether a sequence is still held: neither ended nor replaced."""
        return self._seqs.get(seq.rid) is seq

    def _make_room(self, plan: StepPlan) -> None:
        """Fail the largest requests of a step that ran out of memory, up to half of its tokens, so that the others fit.

        Requests that have already stored results of the step also fail, since these cannot be computed again.
        """
        sizes, most, num_failed = dict(plan.num_new), plan.num_tokens / 2, 0
        self.batcher.abandon(plan)
        for seq in sorted(sizes, key=lambda seq: sizes[seq], reverse=True):
            if num_failed < most or seq.prompt_logprobs is not None or seq.pool is not None:
                num_failed += sizes[seq]
                text = f"the worker is out of memory for a step of {len(sizes)} requests; this is one of the largest"
                self._fail_waiting(seq.rid, Unavailable(text, code="out_of_memory"))
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _sample(self, launched: Launched) -> Flight:
        """Launch the sampling of the next token of every ready sequence, and of one more after each draft token.

        Leaves out sequences that have ended since the launch, and those whose mask is late.
        """
        plan, inputs, logits = launched.plan, launched.inputs, launched.logits
        started_s, held = time.perf_counter(), self._seqs
        gone = {seq for seq in inputs.ready if held.get(seq.rid) is not seq}
        ready = [seq for seq in inputs.ready if seq not in gone] if gone else inputs.ready
        masks, late = grammar_masks(ready, plan.drafts, self.grammars, self._mask_wait_s(plan, ready))
        if masks or late:
            self.counters.mask_s += time.perf_counter() - started_s
        if late or gone:
            logits = without(logits, inputs.ready, plan.drafts, late | gone)
            ready = [seq for seq in ready if seq not in late]
            for seq in late:
                self.batcher.postpone(seq, plan)
        rows = sample_rows(ready, plan.drafts, masks)
        num, outputs = logits.shape[0], list[TokenOutput]()
        sampled = begin_sample(logits if len(rows) == num else logits[: len(rows)], rows) if rows else None
        if inputs.pooled:
            num -= sum(part.needs_logits for part in inputs.pooled)
            outputs = outputs_of(inputs.pooled, logits[num:], self.model.tasks, self.adapters.extras)
        if inputs.prompt_rows:
            record_prompts(logits[:num], inputs.prompt_rows)
        self.batcher.complete(plan)
        self._outputs += outputs
        for output in outputs:
            self._drop(output.rid)
        end = Arriving([launched.logits[:1, :1]] if launched.logits.is_cuda else [])
        return Flight(plan, launched.work, launched.started_s, ready, sampled, end)

    def _mask_wait_s(self, plan: StepPlan, ready: list[Sequence]) -> float:
        """Return how many seconds a step may wait for masks: few if only sequences that yield need them."""
        if plan.limited is not None and all(seq.yields for seq in ready if seq.matcher is not None):
            return YIELDING_MASK_WAIT_S
        return max(MASK_WAIT_S, MASK_WAIT_SHARE * self.meter.elapsed_s)

    def _settle(self, flight: Flight, sampled: Sampled | None) -> int:
        """Append the chosen tokens, finish ended sequences and emit outputs. Return the number of tokens."""
        num_output = row = 0
        for seq in flight.ready:
            assert sampled is not None
            num_rows = 1 + len(flight.plan.drafts.get(seq, ()))
            seq.expect_none()
            num_tokens = seq.num_tokens
            try:
                if not self._holds(seq):  # canceled since the launch
                    continue
                check_choice(seq, sampled, row)
                num_output += self._settle_one(seq, flight.plan, sampled, row)
            except BaseException as error:  # noqa: BLE001  a request's edge: it fails alone
                seq.num_tokens = num_tokens  # no output of this step is emitted
                self._outputs.append(seq.fail(failure_of(seq.request, error)))
                self._drop(seq.rid)
            finally:
                row += num_rows
        return num_output

    def _settle_one(self, seq: Sequence, plan: StepPlan, sampled: Sampled, row: int) -> int:
        """Settle one sequence; return its number of new tokens. row: its first row in `sampled`."""
        draft = plan.drafts.get(seq, [])
        ids, finish = accept_tokens(seq, draft, sampled, row)
        if draft:
            self._note_draft(seq, plan, len(ids) - 1)
        if finish:
            self._drop(seq.rid)
        records = sampled.logprobs[row] if len(ids) == 1 else b"".join(sampled.logprobs[row : row + len(ids)])
        output = seq.put_out(ids, finish, records)
        if seq.prompt_logprobs is not None:
            output.prompt_logprobs, seq.prompt_logprobs = seq.prompt_logprobs.records, None
        self._outputs.append(output)
        return len(ids)

    def _note_draft(self, seq: Sequence, plan: StepPlan, num_right: int) -> None:
        """Count a sequence's draft tokens, of which the first `num_right` were right, and keep the states of those."""
        num_drafted = len(plan.drafts[seq])
        self.counters.num_drafted_tokens += num_drafted
        self.counters.num_accepted_tokens += num_right
        if seq in plan.by_model:
            self.counters.num_model_drafted_tokens += num_drafted
            self.counters.num_model_accepted_tokens += num_right
        self.batcher.learn(seq, plan, num_right)

    def _work_of(self, plan: StepPlan) -> StepWork:
        num_kv_tokens = sum([seq.num_computed + num_new for seq, num_new in plan.num_new.items()])
        sum_ranks = self._sum_ranks(seq.slot for seq in plan.num_new)
        num_passes = 0 if self.model.passes is None else len(plan.num_new)
        return StepWork(plan.num_tokens, num_kv_tokens, sum_ranks, num_passes)

    def _count(self, flight: Flight, num_output: int) -> None:
        """Record a landed step's time, from its start or from the landing of the step before, whichever is later."""
        plan = flight.plan
        self.meter.stop(flight.work, num_output, since_s=flight.started_s, is_limited=plan.limited is not None)
        self.batcher.note_time(plan, self.meter.last_s)
        self.batcher.step_model = self.meter.model
        self.counters.num_preemptions += len(plan.preempted)
        self.counters.num_cached_tokens += plan.num_cached

    # ------------------------------------------------------------ requests

    def add(self, request: EngineRequest) -> None:
        """Accept a request; see `BaseEngine.add`."""
        running = self._seqs.get(request.rid)
        if running is not None:
            if running.request.epoch >= request.epoch:
                return
            self._drop(request.rid)
        try:
            seq, finish = self._binder.open(request)
        except BaseException as error:  # noqa: BLE001  a request's edge: it fails alone
            self._outputs.append(TokenOutput.failed(request, failure_of(request, error)))
            return
        if finish:
            self._outputs.append(seq.put_out([], finish))
            return
        self._seqs[request.rid] = seq
        self._note_taken(request)
        self.batcher.add(seq)

    def _held(self) -> Collection[str]:
        return self._seqs.keys()

    def _waiting(self) -> Iterator[EngineRequest]:
        return (seq.request for seq in self.batcher.waiting)

    def _fail_waiting(self, rid: str, error: LorafleetError) -> None:
        self._outputs.append(self._seqs[rid].fail(error))
        self._drop(rid)

    def _drop(self, rid: str) -> None:
        seq = self._seqs.pop(rid, None)
        if seq is None:
            return
        self.batcher.remove(seq)
        if seq.pending_matcher is not None:
            seq.pending_matcher.cancel()

    def _on_evicted(self, digest: str) -> None:
        super()._on_evicted(digest)
        self.blocks.demote(digest)

    # ------------------------------------------------------------ the engine as a whole

    def wake_with(self, wake: Callable[[], object]) -> None:
        """Set the callback that is called when an adapter or a grammar is ready."""
        super().wake_with(wake)
        self.grammars.on_ready = wake

    def close(self) -> None:
        """Start no more work in other threads, neither loads nor compilations."""
        super().close()
        self.grammars.close()

    def check_integrity(self) -> None:
        """Raise AssertionError unless every block, page and reference is accounted for. Takes milliseconds."""
        self.batcher.check_integrity()
        super().check_integrity()

    def stats(self) -> m.WorkerBeat:
        """Return the engine's current figures."""
        return self._stats(
            capacity=self.config.limits.max_num_seqs,
            running=len(self.batcher.running),
            waiting=len(self.batcher.waiting),
            kv_blocks_free=self.blocks.num_free,
            kv_blocks_total=self.blocks.num_blocks,
            kv_bytes_total=self.config.kv_bytes,
        )


def _log_no_memory(plan: StepPlan, error: BaseException) -> None:
    logger.warning("out of memory for a step of %d tokens: %s", plan.num_tokens, error)
