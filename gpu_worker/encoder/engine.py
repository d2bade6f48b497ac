"""The engine around an encoder: whole texts of any adapters in, one `step` at a time, vectors or labels out.

The same surface as `engine.Engine`, so that the same thread runs it. A request is done in the step that takes it: there
is no cache, nothing to preempt, and what runs is never more than one step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field

import numpy as np
import torch

from gpu_worker.adapters.cache import AdapterCache
from gpu_worker.adapters.residency import Residency
from gpu_worker.encoder.model import EncoderModel
from gpu_worker.engine.request import EngineRequest, EngineStats, TokenOutput
from gpu_worker.engine.runner import extra_rows, lora_batch
from gpu_worker.engine.step_model import StepFit
from protocol.wire.errors import BadRequest, Internal, LorafleetError
from protocol.wire.messages import WorkerCounters


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """Sizes of one engine, all decided."""

    max_num_seqs: int  # texts in one step
    max_step_tokens: int  # a longer text has a step of its own
    max_model_len: int  # tokens of one text


@dataclass(slots=True)
class Batch:
    """The texts of one step, and the slots of their adapters (-1: none)."""

    requests: list[EngineRequest] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    num_tokens: int = 0

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(request.prompt) for request in self.requests])


class EncoderEngine:
    """Runs texts of any adapters together."""

    def __init__(self, model: EncoderModel, config: EncoderConfig, adapters: AdapterCache) -> None:
        self.model = model
        self.config = config
        self.adapters = adapters
        self.orders = Residency(adapters)
        self.can_step = False  # whether the next step may do something without a new request or adapter
        self.counters = WorkerCounters()
        self._waiting: dict[str, EngineRequest] = {}  # by id, in the order they came
        self._outputs: list[TokenOutput] = []  # made outside a forward pass, given out by the next step
        self._fit = StepFit()
        self._step_s = 0.0
        adapters.on_evicted = self._on_evicted

    @property
    def has_work(self) -> bool:
        """Whether any request is held or any output waits to be given out."""
        return bool(self._waiting or self._outputs)

    def wake_with(self, wake: Callable[[], object]) -> None:
        """Call `wake`, from any thread, when something has come that a step may go on with."""
        self.adapters.on_loaded = wake

    def close(self) -> None:
        """Start nothing more in other threads."""
        self.adapters.close()

    def check_integrity(self) -> None:
        """Raise AssertionError unless every page and reference is accounted for."""
        self.adapters.pool.check_integrity()

    # ------------------------------------------------------------ requests

    def add(self, request: EngineRequest) -> None:
        """Take a request. What is wrong with it comes out of the next step as its error."""
        held = self._waiting.get(request.rid)
        if held is not None and held.epoch >= request.epoch:  # delivered twice
            return
        self._waiting.pop(request.rid, None)
        if request.output:  # its last worker died between the log and the end, which one script writes: be safe
            self._outputs.append(TokenOutput(request.rid, request.epoch, len(request.output), finish="stop"))
            return
        try:
            self._check(request)
        except LorafleetError as error:
            self._outputs.append(_failed(request, error))
            return
        if request.digest:
            self.adapters.events.record_use(request.digest, resident=self.adapters.is_resident(request.digest))
        self._waiting[request.rid] = request

    def _check(self, request: EngineRequest) -> None:
        """Raise BadRequest for what no step could compute."""
        if request.task != self.model.task:
            raise BadRequest(f"this worker's model does {self.model.task}; it does not {request.task}")
        if not len(request.prompt):
            raise BadRequest("the text is empty", param="input")
        if len(request.prompt) > self.config.max_model_len:
            raise BadRequest(
                f"the text has {len(request.prompt)} tokens, this model takes at most {self.config.max_model_len}",
                code="context_length_exceeded",
            )

    def cancel(self, rid: str) -> None:
        """Forget a request; nothing more comes out for it."""
        self._outputs = [output for output in self._outputs if output.rid != rid]
        self._waiting.pop(rid, None)

    def hand_over(self) -> list[str]:
        """Forget all requests; returns their ids."""
        rids = list(self._waiting)
        self._waiting, self._outputs = {}, []
        return rids

    def prefetch(self, digest: str) -> None:
        """Bring an adapter towards the pool, for a request that will come."""
        self.adapters.prefetch(digest)

    # ------------------------------------------------------------ steps

    def step(self) -> list[TokenOutput]:
        """Compute one batch. Returns what it made of each request that ended."""
        started = time.perf_counter()
        self._fail_adapters(self.adapters.poll())
        batch = self._take()
        # After the batch, so that no adapter leaves the pool that it uses.
        wanted = [request.digest for request in self._waiting.values() if request.digest]
        self._fail_adapters(self.adapters.load([*wanted, *self.orders.wanted()]))
        self.orders.settle(wanted)
        if batch.requests:
            try:
                results = self._compute(batch)
            finally:
                for request in batch.requests:
                    self._release(request)
            self._outputs += map(_output, batch.requests, results)
            self._count(batch, time.perf_counter() - started)
        outputs, self._outputs = self._outputs, []
        self.can_step = bool(batch.requests and self._waiting)
        return outputs

    def _take(self) -> Batch:
        """Take the next texts whose adapters are there, in order."""
        batch = Batch()
        for request in list(self._waiting.values()):
            is_over = batch.num_tokens + len(request.prompt) > self.config.max_step_tokens
            if batch.requests and (is_over or len(batch.requests) == self.config.max_num_seqs):
                break
            slot = self.adapters.acquire(request.digest) if request.digest else -1
            if slot is None:
                continue
            del self._waiting[request.rid]
            error = self._misfit(request)
            if error is not None:
                self._release(request)
                self._outputs.append(_failed(request, error))
                continue
            batch.requests.append(request)
            batch.slots.append(slot)
            batch.num_tokens += len(request.prompt)
        return batch

    def _release(self, request: EngineRequest) -> None:
        if request.digest:
            self.adapters.release(request.digest)

    def _misfit(self, request: EngineRequest) -> LorafleetError | None:
        """Return why a text cannot be computed under its adapter, which is there."""
        if self.adapters.invocations.get(request.digest):
            return BadRequest("adapters with alora_invocation_tokens are not served on encoders", param="model")
        extras = self.adapters.extras.get(request.digest)
        vocab_size = (extras.vocab_size if extras is not None else 0) or self.model.vocab_size
        if request.prompt.min() < 0 or request.prompt.max() >= vocab_size:
            return BadRequest(f"the text holds token ids outside 0 … {vocab_size - 1}", param="input")
        return None

    def _compute(self, batch: Batch) -> list[np.ndarray]:
        """Return of each text what goes into its log: int32, see `messages.Body.task`."""
        model, lengths = self.model, batch.lengths
        with torch.inference_mode():
            ids, positions = model.prepare([request.prompt for request in batch.requests])
            self._set_adapters(batch)
            found = model.forward(ids, positions)
            if model.task == "embed":
                vectors = torch.stack([model.pooling.apply(part) for part in found.split(lengths.tolist())])
                return list(vectors.cpu().numpy().view(np.int32))
            best = found.float().softmax(-1).max(-1)
            pairs = torch.stack([best.indices.int(), best.values.view(torch.int32)], -1).cpu().numpy()
        return [part.reshape(-1) for part in np.split(pairs, np.cumsum(lengths)[:-1])]

    def _set_adapters(self, batch: Batch) -> None:
        """Note in the context which rows of the step have which adapter."""
        context, device, lengths = self.model.context, self.model.device, batch.lengths
        scales = np.array([request.lora_scale for request in batch.requests], np.float32)
        slots = np.array(batch.slots, np.int32)
        context.lora = lora_batch(np.repeat(slots, lengths), np.repeat(scales, lengths), device)
        context.extras = []
        owners: dict[tuple[str, float], list[np.ndarray]] = {}
        for request, end in zip(batch.requests, np.cumsum(lengths), strict=True):
            if request.digest in self.adapters.extras:
                own = owners.setdefault((request.digest, request.lora_scale), [])
                own.append(np.arange(end - len(request.prompt), end))
        for (digest, scale), parts in owners.items():
            rows = np.concatenate(parts)
            active = np.ones(len(rows), bool)
            context.extras.append(extra_rows(self.adapters.extras[digest], rows, active, scale, device))

    def _count(self, batch: Batch, seconds: float) -> None:
        self.counters.num_steps += 1
        self.counters.num_computed_tokens += batch.num_tokens
        self.counters.forward_s += seconds
        slots = {slot for slot in batch.slots if slot >= 0}
        sum_ranks = int(self.adapters.slot_ranks[list(slots)].sum())
        self._fit.add(seconds, batch.num_tokens, batch.num_tokens, sum_ranks)
        old = 0.9 if self._step_s else 0.0
        self._step_s = old * self._step_s + (1 - old) * seconds

    def _fail_adapters(self, failed: dict[str, LorafleetError]) -> None:
        """End the requests that wait for an adapter that cannot be loaded."""
        if not failed:
            return
        self.orders.note(failed)
        for request in list(self._waiting.values()):
            error = failed.get(request.digest)
            if error is not None:
                self._outputs.append(_failed(request, error))
                del self._waiting[request.rid]

    def _on_evicted(self, digest: str) -> None:
        self.counters.num_evictions += 1

    def stats(self) -> EngineStats:
        wanted = [request.digest for request in self._waiting.values() if request.digest]
        return EngineStats(
            capacity=self.config.max_num_seqs,
            max_step_tokens=self.config.max_step_tokens,
            waiting=len(self._waiting),
            step_ms=1000 * self._step_s,
            step_model=self._fit.model(),
            counters=copy(self.counters),
            **self.orders.figures(wanted),
        )


def _output(request: EngineRequest, found: np.ndarray) -> TokenOutput:
    values = found.view(np.float32) if request.task == "embed" else found[1::2].view(np.float32)
    if not np.isfinite(values).all():
        return _failed(request, Internal("the model's output is not finite"))
    return TokenOutput(request.rid, request.epoch, 0, found.tolist(), finish="stop")


def _failed(request: EngineRequest, error: LorafleetError) -> TokenOutput:
    return TokenOutput(request.rid, request.epoch, len(request.output), finish="error", error=error)
