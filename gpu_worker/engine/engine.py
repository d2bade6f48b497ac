"""The engine: requests in, one `step` at a time, tokens out. One thread; see `thread.py` for the one that runs it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from gpu_worker.adapters.cache import AdapterCache
from gpu_worker.adapters.residency import Residency
from gpu_worker.engine.batcher import Batcher, Limits, StepPlan
from gpu_worker.engine.blocks import BlockPool
from gpu_worker.engine.grammars import Grammars
from gpu_worker.engine.prompt_logprobs import PromptLogprobs, take_parts
from gpu_worker.engine.request import EngineRequest, EngineStats, Sequence, TokenOutput
from gpu_worker.engine.runner import Runner
from gpu_worker.engine.sampling import Sampled, SampleRow, sample
from gpu_worker.engine.speculation import Drafter
from gpu_worker.engine.step_model import MIN_STEPS, StepFit
from gpu_worker.engine.stop import StopCheck
from gpu_worker.model.model import BaseModel
from protocol.wire.errors import BadRequest, Internal, LorafleetError
from protocol.wire.messages import WorkerCounters

logger = logging.getLogger(__name__)

Masks = dict[Sequence, np.ndarray]
"""Of each sequence with a grammar, int32 [1 + guesses, W]: the tokens that may come, and that may follow each guess."""

NEVER = 1 << 40
"""A position behind every text."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes of one engine, all decided."""

    limits: Limits
    num_blocks: int
    max_model_len: int  # tokens of prompt and output of one request


class Engine:
    """Runs requests of any adapters together, step by step."""

    def __init__(
        self, model: BaseModel, config: EngineConfig, adapters: AdapterCache, tokenizer: Tokenizer | None = None
    ) -> None:
        self.model = model
        self.config = config
        self.adapters = adapters
        self.orders = Residency(adapters)
        self.runner = Runner(model, config.num_blocks, adapters.extras)
        self.runner.check()
        self.blocks = BlockPool(config.num_blocks)
        self.batcher = Batcher(config.limits, self.blocks, adapters, model.fingerprint)
        adapters.on_evicted = self._on_evicted
        self.grammars = Grammars(model.vocab_size, model.eos_ids)
        self.can_step = False  # whether the next step may do something without a new request or adapter
        self._tokenizer = tokenizer
        self._seqs: dict[str, Sequence] = {}
        self._stops: dict[str, StopCheck] = {}
        self._outputs: list[TokenOutput] = []  # made outside a forward pass, given out by the next step
        self.counters = WorkerCounters()
        self._fit = StepFit()
        self._step_s = 0.0
        self._tokens_per_s = 0.0

    @property
    def has_work(self) -> bool:
        """Whether any request is held or any output waits to be given out."""
        return bool(self._seqs or self._outputs)

    def add(self, request: EngineRequest) -> None:
        """Take a request. What is wrong with it comes out of the next step as its error."""
        try:
            self._start(request)
        except LorafleetError as error:
            self._outputs.append(
                TokenOutput(request.rid, request.epoch, len(request.output), finish="error", error=error)
            )

    def _start(self, request: EngineRequest) -> None:
        running = self._seqs.get(request.rid)
        if running is not None:
            if running.request.epoch >= request.epoch:  # delivered twice
                return
            self._end(running)
        _check(request, self.config.max_model_len)
        if not request.digest:  # an adapter may know other ids, and need not be here yet
            _check_ids(request, self.model.vocab_size)
        seq = Sequence(request, self.config.max_model_len)
        if request.sampling.prompt_logprobs and not request.output:
            seq.prompt_logprobs = PromptLogprobs(request.prompt, request.sampling.num_logprobs or 0)
        if self.config.limits.max_draft_tokens:
            seq.drafter = Drafter(self.config.limits.max_draft_tokens)
        # Where an adapter brings its own tokenizer, only that tells what the text is in which stop strings are found.
        if (request.digest and any(request.stop)) or self._replay(seq, self._tokenizer):
            self._seqs[request.rid] = seq
            if request.grammar and not request.digest:
                self._compile(seq, self._tokenizer)
            if request.digest:
                self.adapters.events.record_use(request.digest, resident=self.adapters.is_resident(request.digest))
            self.batcher.add(seq)

    def _replay(self, seq: Sequence, tokenizer: Tokenizer | None) -> bool:
        """Start a request's stop check on the tokens it has. False if they end it: then that is put out."""
        stop = StopCheck(seq, self.model.eos_ids, tokenizer)
        finish = ""
        for token in seq.request.output:
            finish = finish or stop.add(token)
        if finish:  # its last worker died between its last token and its end
            self._outputs.append(_output(seq, [], b"", finish, stop.stop))
            return False
        self._stops[seq.rid] = stop
        return True

    def cancel(self, rid: str) -> None:
        """Forget a request; nothing more comes out for it."""
        self._outputs = [output for output in self._outputs if output.rid != rid]
        if rid in self._seqs:
            self._end(self._seqs[rid])

    def hand_over(self) -> list[str]:
        """Forget all requests; returns their ids."""
        rids = list(self._seqs)
        for seq in list(self._seqs.values()):
            self._end(seq)
        self._outputs = []
        return rids

    def _end(self, seq: Sequence) -> None:
        self.batcher.remove(seq)
        if seq.coming is not None:
            seq.coming.cancel()
        del self._seqs[seq.rid]
        self._stops.pop(seq.rid, None)

    def wake_with(self, wake: Callable[[], object]) -> None:
        """Call `wake`, from any thread, when something has come that a step may go on with."""
        self.adapters.on_loaded = self.grammars.on_ready = wake

    def close(self) -> None:
        """Start nothing more in other threads."""
        self.adapters.close()
        self.grammars.close()

    def check_integrity(self) -> None:
        """Raise AssertionError unless every block, page and reference is accounted for. Takes milliseconds."""
        self.batcher.check_integrity()
        self.adapters.pool.check_integrity()

    def step(self) -> list[TokenOutput]:
        """Compute one batch. Returns what it made of each request that got a token or ended."""
        clock = time.perf_counter
        started = clock()
        self._fail_adapters(self.adapters.poll())
        self._bind_waiting()
        plan = self.batcher.plan()
        # After the plan, so that no adapter leaves the pool that the plan could use.
        wanted = self._wanted_adapters()
        self._fail_adapters(self.adapters.load([*wanted, *self.orders.wanted()]))
        self.orders.settle(wanted)
        if plan.num_new:
            work, before = self._work_of(plan), self.counters.num_output_tokens
            planned = clock()
            inputs = self.runner.prepare(plan)
            prepared = clock()
            logits = self.runner.run(inputs)
            ran = clock()
            self.batcher.complete(plan)
            masks = self._masks(inputs.ready, plan.drafts)
            if inputs.prompt_parts:
                logits = take_parts(logits, inputs.prompt_parts)
            rows = [row for seq in inputs.ready for row in self._sample_rows(seq, plan.drafts.get(seq, []), masks)]
            sampled = sample(logits, rows) if rows else None
            chosen = clock()
            if sampled is not None:
                self._take_all(inputs.ready, plan.drafts, sampled)
            num_output = self.counters.num_output_tokens - before
            self._count(plan, work, [started, planned, prepared, ran, chosen, clock()], num_output)
        outputs, self._outputs = self._outputs, []
        self.can_step = bool(plan.num_new and self._seqs)
        return outputs

    def _work_of(self, plan: StepPlan) -> tuple[int, int, int]:
        """Return a plan's tokens, the cached tokens they attend to, and the sum of ranks of its distinct adapters."""
        slots = {seq.slot for seq in plan.num_new if seq.slot >= 0}
        num_kv_tokens = sum(seq.num_computed + num_new for seq, num_new in plan.num_new.items())
        return plan.num_tokens, num_kv_tokens, int(self.adapters.slot_ranks[list(slots)].sum())

    def _count(self, plan: StepPlan, work: tuple[int, int, int], times: list[float], num_output: int) -> None:
        counters = self.counters
        counters.num_steps += 1
        counters.num_preemptions += len(plan.preempted)
        counters.num_computed_tokens += plan.num_tokens
        counters.num_cached_tokens += plan.num_cached
        counters.plan_s += times[1] - times[0]
        counters.inputs_s += times[2] - times[1]
        counters.forward_s += times[3] - times[2]
        counters.sample_s += times[4] - times[3]
        counters.finish_s += times[5] - times[4]
        seconds = times[5] - times[0]
        self._fit.add(seconds, *work)
        if counters.num_steps % MIN_STEPS == 0:
            self.batcher.step_model = self._fit.model()
        old = 0.9 if self._step_s else 0.0
        self._step_s = old * self._step_s + (1 - old) * seconds
        self._tokens_per_s = old * self._tokens_per_s + (1 - old) * num_output / seconds

    def _wanted_adapters(self) -> list[str]:
        return [seq.request.digest for seq in self.batcher.waiting if seq.request.digest]

    def _fail_adapters(self, failed: dict[str, LorafleetError]) -> None:
        """End the requests that wait for an adapter that cannot be loaded."""
        if not failed:
            return
        self.orders.note(failed)
        for seq in list(self.batcher.waiting):
            error = failed.get(seq.request.digest)
            if error is not None:
                self._outputs.append(_failed(seq, error))
                self._end(seq)

    def _bind_waiting(self) -> None:
        """Settle for requests whose adapter has come where it sets in, and end those it cannot serve."""
        for seq in [seq for seq in self.batcher.waiting if not seq.is_bound]:
            if seq.request.digest and not self.adapters.is_resident(seq.request.digest):
                continue
            try:
                goes_on = self._bind_adapter(seq) and self._bind_grammar(seq)
            except LorafleetError as error:
                self._outputs.append(_failed(seq, error))
                self._end(seq)
                continue
            if not goes_on:
                self._end(seq)

    def _bind_adapter(self, seq: Sequence) -> bool:
        """Settle what a request's adapter means for it. False if it has ended, which is then put out."""
        digest = seq.request.digest
        if not digest:
            return True
        extras = self.adapters.extras.get(digest)
        own_vocab = extras.vocab_size if extras is not None else 0
        _check_ids(seq.request, own_vocab or self.model.vocab_size)
        tokenizer = self.adapters.tokenizers.get(digest, self._tokenizer)
        if seq.rid not in self._stops and not self._replay(seq, tokenizer):
            return False
        if seq.request.grammar and seq.coming is None:
            self._compile(seq, tokenizer)
        invocation = self.adapters.invocations.get(digest)
        if invocation:
            seq.activates, seq.active_from = True, activation(seq.request.prompt, invocation)
            seq.num_base = 0 if extras is not None and extras.reaches_all_rows else seq.active_from
        return True

    def _compile(self, seq: Sequence, tokenizer: Tokenizer | None) -> None:
        """Start making a request's matcher. It is let into a step once it has it."""
        request = seq.request
        seq.coming = self.grammars.make(request.grammar, tokenizer, request.output, request.stop_token_ids)

    def _bind_grammar(self, seq: Sequence) -> bool:
        """Take a request's matcher if it has been made. False if the output is whole, which is then put out."""
        if seq.coming is not None:
            if not seq.coming.done():
                return True
            seq.matcher = seq.coming.result()
            if seq.matcher.is_complete:  # its last worker died between its last token and its end
                self._outputs.append(_output(seq, [], b"", "stop", ""))
                return False
        seq.is_bound = True
        return True

    def _masks(self, ready: list[Sequence], drafts: Mapping[Sequence, list[int]]) -> Masks:
        """Find out which tokens the sequences' grammars allow, while a GPU still computes the logits."""
        started = time.perf_counter()
        guided = [(seq, seq.matcher) for seq in ready if seq.matcher is not None]
        if not guided:
            return {}
        masks = self.grammars.fill([(matcher, drafts.get(seq, [])) for seq, matcher in guided])
        for (seq, matcher), own in zip(guided, masks, strict=True):
            for i, mask in enumerate(own):
                matcher.settle_ends(mask, self._stops[seq.rid].banned(i))
        self.counters.mask_s += time.perf_counter() - started
        return {seq: own for (seq, _), own in zip(guided, masks, strict=True)}

    def _on_evicted(self, digest: str) -> None:
        self.counters.num_evictions += 1
        self.blocks.demote(digest)

    def prefetch(self, digest: str) -> None:
        """Bring an adapter towards the pool, for a request that will come."""
        self.adapters.prefetch(digest)

    def _sample_rows(self, seq: Sequence, guesses: list[int], masks: Masks) -> Iterator[SampleRow]:
        """Yield what to choose by: for the next token, and for the one after each guess, as if that were right."""
        prompt, stop, num = seq.tokens[: seq.num_prompt], self._stops[seq.rid], seq.num_output
        output = np.concatenate((seq.output, np.array(guesses, np.int32))) if guesses else seq.output
        own = masks.get(seq)
        for i in range(len(guesses) + 1):
            if own is None:
                yield SampleRow(seq.request.sampling, prompt, output[: num + i], stop.banned(i))
            else:
                yield SampleRow(seq.request.sampling, prompt, output[: num + i], mask=own[i])

    def _take_all(self, ready: list[Sequence], drafts: Mapping[Sequence, list[int]], sampled: Sampled) -> None:
        row = 0
        for seq in ready:
            guesses = drafts.get(seq, [])
            error = seq.matcher.error if seq.matcher is not None else None
            if error is None and sampled.finite[row]:
                self._take(seq, guesses, sampled, row)
            else:
                self._outputs.append(_failed(seq, error or Internal("the model's logits are not finite")))
                self._end(seq)
            row += 1 + len(guesses)

    def _take(self, seq: Sequence, guesses: list[int], sampled: Sampled, row: int) -> None:
        """Append the chosen token, and those after it as long as the guesses they were computed from are right.

        row: of the first in `sampled`; that of the token after each guess follows.
        """
        stop = self._stops[seq.rid]
        ids: list[int] = []
        finish = ""
        for i in range(row, row + len(guesses) + 1):
            if not sampled.finite[i]:  # the next step finds the same
                break
            token = int(sampled.ids[i])
            seq.append(token)
            ids.append(token)
            finish = _finish(seq, token, stop.add(token))
            if finish or i - row == len(guesses) or token != guesses[i - row]:
                break
        self.counters.num_output_tokens += len(ids)
        if guesses:
            self._settle(seq, guesses, ids)
        if finish:
            self._end(seq)
        logprobs = b"".join(sampled.logprobs[row : row + len(ids)])
        output = _output(seq, ids, logprobs, finish, stop.stop)
        if seq.prompt_logprobs is not None:
            output.prompt_logprobs, seq.prompt_logprobs = seq.prompt_logprobs.records, None
        self._outputs.append(output)

    def _settle(self, seq: Sequence, guesses: list[int], ids: list[int]) -> None:
        """Keep the keys and values of the guesses that are right, which all tokens but the last came from."""
        num_right = len(ids) - 1
        self.counters.num_drafted_tokens += len(guesses)
        self.counters.num_accepted_tokens += num_right
        self.batcher.advance(seq, num_right)
        if seq.drafter is not None:
            seq.drafter.learn(len(guesses), num_right)

    def stats(self) -> EngineStats:
        return EngineStats(
            capacity=self.config.limits.max_num_seqs,
            max_step_tokens=self.config.limits.max_step_tokens,
            running=len(self.batcher.running),
            waiting=len(self.batcher.waiting),
            kv_blocks_free=self.blocks.num_free,
            kv_blocks_total=self.blocks.num_blocks,
            step_ms=1000 * self._step_s,
            tokens_per_s=self._tokens_per_s,
            step_model=self._fit.model(),
            counters=copy(self.counters),
            **self.orders.figures(self._wanted_adapters()),
        )


def _finish(seq: Sequence, token: int, finish: str) -> str:
    """Let a sequence's matcher take a token; return how it ends the request: as the stop check says, or the grammar."""
    if seq.matcher is None or finish == "stop":
        return finish
    seq.matcher.consume(token)
    return "stop" if seq.matcher.is_complete else finish


def _check(request: EngineRequest, max_model_len: int) -> None:
    """Raise BadRequest for what no step could compute."""
    if request.task != "generate":
        raise BadRequest(f"this worker's model generates text; it does not {request.task}")
    num = len(request.prompt)
    if num == 0:
        raise BadRequest("the prompt is empty", param="prompt")
    if num >= max_model_len:
        raise BadRequest(
            f"the prompt has {num} tokens, this model takes at most {max_model_len} with the output",
            code="context_length_exceeded",
        )
    if request.max_new_tokens < 1:
        raise BadRequest("max_new_tokens must be at least 1", param="max_tokens")


def _check_ids(request: EngineRequest, vocab_size: int) -> None:
    """Raise BadRequest for token ids that the model, or the adapter, does not have."""
    if request.prompt.min() < 0 or request.prompt.max() >= vocab_size:
        raise BadRequest(f"the prompt holds token ids outside 0 … {vocab_size - 1}", param="prompt")
    ids = [*request.sampling.logit_bias, *request.stop_token_ids]
    if any(not 0 <= token < vocab_size for token in ids):
        raise BadRequest(f"logit_bias or stop_token_ids holds ids outside 0 … {vocab_size - 1}")


def activation(prompt: np.ndarray, invocation: tuple[int, ...]) -> int:
    """Return where the last `invocation` in the prompt begins; far behind every text if it is not there."""
    wanted = np.array(invocation, prompt.dtype)
    if len(wanted) > len(prompt):
        return NEVER
    windows = np.lib.stride_tricks.sliding_window_view(prompt, len(wanted))
    found = np.flatnonzero((windows == wanted).all(-1))
    return int(found[-1]) if len(found) else NEVER


def _output(seq: Sequence, ids: list[int], logprobs: bytes, finish: str, stop: str) -> TokenOutput:
    return TokenOutput(
        rid=seq.rid,
        epoch=seq.request.epoch,
        seq0=seq.num_output - len(ids),
        ids=ids,
        logprobs=logprobs,
        finish=finish,
        stop=stop if finish == "stop" else "",
        num_cached_tokens=seq.num_cached or 0,
    )


def _failed(seq: Sequence, error: LorafleetError) -> TokenOutput:
    output = _output(seq, [], b"", "error", "")
    output.error = error
    return output
