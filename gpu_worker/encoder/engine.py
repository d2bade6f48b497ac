"""The engine of an encoder: takes whole texts for any adapters, computes one `step` at a time, emits vectors or labels.

A request ends in the step that computes it: there is no cache and no preemption, and only one step's requests run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import numpy as np
import torch

from gpu_worker.adapters.cache import AdapterCache
from gpu_worker.encoder.model import EncoderModel
from gpu_worker.engine.base import BaseEngine
from gpu_worker.engine.runner import group_by_adapter
from gpu_worker.engine.step_model import StepWork
from gpu_worker.layers.apply_extras import ExtraRows
from gpu_worker.layers.step_rows import extra_rows, lora_batch
from gpu_worker.planning.policy import MAX_SKIPS
from gpu_worker.planning.request import BATCH_PRIORITY, EngineRequest, TokenOutput, failure_of, room_error
from lora_kernels import ops
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest, Internal, LorafleetError


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """Sizes of one engine, checked against each other."""

    max_num_seqs: int  # maximum texts in a step
    max_step_tokens: int  # maximum tokens of a step; a longer text has a step of its own
    max_model_len: int  # maximum tokens of a text
    max_slowdown: float = 0.0  # factor by which texts that yield may lengthen a step; 0: unlimited
    max_batch_slowdown: float = 0.0  # the same for batch work; 0: use `max_slowdown`


@dataclass(slots=True)
class TextBatch:
    """The texts of one step, and the slots of their adapters (-1: none)."""

    requests: list[EngineRequest] = field(default_factory=list)
    texts: list[np.ndarray] = field(default_factory=list)  # int [L] each, including leading virtual tokens
    slots: list[int] = field(default_factory=list)
    num_tokens: int = 0

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens in each text: int64 [S]."""
        return np.array([len(text) for text in self.texts])

    @property
    def seconds(self) -> list[int]:
        """The position at which the second text of each pair begins, 0 for no pair."""
        return [
            request.second and request.second + len(text) - len(request.prompt)
            for request, text in zip(self.requests, self.texts, strict=True)
        ]


class EncoderEngine(BaseEngine):
    """Runs texts for any mix of adapters together."""

    def __init__(self, model: EncoderModel, config: EncoderConfig, adapters: AdapterCache) -> None:
        super().__init__(adapters)
        self.model = model
        self.config = config
        self._requests: dict[str, EngineRequest] = {}  # all waiting ones: by id, in order of arrival
        self._label_site = next((site.index for site in model.sites if site.name == model.label_head), -1)
        self._num_skips: Counter[str] = Counter()  # by id, steps that left a yielding text out

    # ------------------------------------------------------------ a step

    def step(self) -> list[TokenOutput]:
        """Compute one batch. Return the outputs of requests that ended."""
        self.meter.start()
        self._collect_adapters()
        batch = self._plan()
        if batch.requests:
            self._run(batch)
            self.meter.lap("forward")
            self.meter.stop(StepWork(batch.num_tokens, batch.num_tokens, self._sum_ranks(batch.slots)))
        self.can_step = bool(batch.requests and self._requests)
        return self._put_out()

    def _plan(self) -> TextBatch:
        """Choose the step's texts, then the adapters to load for later steps."""
        batch = self._next_batch()
        self.timelines.begin(request.rid for request in batch.requests)
        self._request_adapters()
        return batch

    def _next_batch(self) -> TextBatch:
        """Take the next texts with resident adapters, in order; texts that yield come after the others.

        Beside others, yielding texts may make the step up to `max_slowdown` times as long in tokens, batch work
        `max_batch_slowdown` times. A text skipped more than `MAX_SKIPS` times no longer yields, except batch work.
        """
        config, batch = self.config, TextBatch()
        classes: list[list[EngineRequest]] = [[] for _ in range(BATCH_PRIORITY + 1)]
        for request in self._requests.values():
            is_late = request.priority < BATCH_PRIORITY and self._num_skips[request.rid] > MAX_SKIPS
            classes[0 if is_late else request.priority].append(request)
        slowdowns = (0.0, config.max_slowdown, config.max_batch_slowdown or config.max_slowdown)
        for requests, slowdown in zip(classes, slowdowns, strict=True):
            others = batch.num_tokens
            most = config.max_step_tokens if not (others and slowdown) else int(slowdown * others)
            self._take(requests, batch, min(most, config.max_step_tokens))
            if others:
                self._num_skips.update(request.rid for request in requests if request.rid in self._requests)
        return batch

    def _take(self, requests: Iterable[EngineRequest], batch: TextBatch, most: int) -> None:
        """Add texts to a batch, in order, up to `most` tokens; a longer text may be alone in it."""
        for request in requests:
            num_virtual = self._num_virtual(request)
            is_over = batch.num_tokens + num_virtual + len(request.prompt) > most
            if batch.requests and (is_over or len(batch.requests) == self.config.max_num_seqs):
                break
            slot = self.adapters.acquire(request.digest) if request.digest else -1
            if slot is None:
                continue
            error = self._adapter_misfit(request, num_virtual)
            if error is not None:
                self._release(request)
                self._fail_waiting(request.rid, error)
                continue
            self._drop(request.rid)
            text = np.concatenate([-1 - np.arange(num_virtual), request.prompt])
            batch.requests.append(request)
            batch.texts.append(text)
            batch.slots.append(slot)
            batch.num_tokens += len(text)

    def _run(self, batch: TextBatch) -> None:
        """Compute a batch, release its adapters, and emit its results."""
        try:
            results = self._compute(batch)
        finally:
            for request in batch.requests:
                self._release(request)
        self._outputs += map(_output, batch.requests, results)

    def _release(self, request: EngineRequest) -> None:
        if request.digest:
            self.adapters.release(request.digest)

    def _adapter_misfit(self, request: EngineRequest, num_virtual: int) -> LorafleetError | None:
        """Return the error for a text that cannot be computed with its resident adapter; None if it can.

        num_virtual: number of the adapter's virtual tokens.
        """
        if self.model.missing and not request.digest:
            message = f"the base model's folder has no weights of {', '.join(self.model.missing)}: use an adapter"
            return BadRequest(message, param="model")
        if self.adapters.invocations.get(request.digest):
            return BadRequest("adapters with alora_invocation_tokens are not served on encoders", param="model")
        extras = self.adapters.extras.get(request.digest)
        if extras is not None and (error := extras.scale_error(request.lora_scale)) is not None:
            return error
        vocab_size = (extras.vocab_size if extras is not None else 0) or self.model.vocab_size
        if (error := room_error(request, num_virtual, self.config.max_model_len)) is not None:
            return error
        if request.prompt.min() < 0 or request.prompt.max() >= vocab_size:
            return BadRequest(f"the text holds token ids outside 0 … {vocab_size - 1}", param="input")
        return None

    def _compute(self, batch: TextBatch) -> list[np.ndarray]:
        """Return what is written to each text's log, int32; see `messages.Body.task`."""
        model, lengths = self.model, batch.lengths
        with torch.inference_mode():
            inputs = model.prepare(batch.texts, batch.seconds)
            if model.apart:
                found = model.forward(inputs, partial(self._set_text, batch))
            else:
                self._set_adapters(batch)
                found = model.forward(inputs)
            model.context.of_all = None
            if model.task == "score":
                logits = model.score(inputs, found, partial(self._set_head_adapters, batch))
                nums = [self._num_labels(request) for request in batch.requests]
                return [part[:num].float().cpu().numpy().view(np.int32) for part, num in zip(logits, nums, strict=True)]
            if model.task == "embed":
                vectors = torch.stack([model.pooling.apply(part) for part in found.split(lengths.tolist())])
                return list(vectors.cpu().numpy().view(np.int32))
            best = found.float().softmax(-1).max(-1)
            pairs = torch.stack([best.indices.int(), best.values.view(torch.int32)], -1).cpu().numpy()
        return [part.reshape(-1) for part in np.split(pairs, np.cumsum(lengths)[:-1])]

    def _set_adapters(self, batch: TextBatch) -> None:
        """Set the adapters of the step's rows in the model's context."""
        context, device, lengths = self.model.context, self.model.device, batch.lengths
        scales = np.array([request.lora_scale for request in batch.requests], np.float32)
        slots = np.array(batch.slots, np.int32)
        context.lora = lora_batch(np.repeat(slots, lengths), np.repeat(scales, lengths), device)
        context.extras = []
        ends = np.cumsum(lengths)
        for (digest, scale), members in group_by_adapter(batch.requests, self.adapters.extras).items():
            rows = np.concatenate([np.arange(ends[i] - lengths[i], ends[i]) for i in members])
            active = np.ones(len(rows), bool)
            context.extras.append(extra_rows(self.adapters.extras[digest], rows, active, scale, device))

    def _set_text(self, batch: TextBatch, index: int) -> None:
        """Set the adapter of a pass, whose rows are all of one text."""
        request, device = batch.requests[index], self.model.device
        slot, scale = batch.slots[index], request.lora_scale
        own = self.adapters.extras.get(request.digest) if request.digest else None

        @cache
        def of_all(num: int) -> tuple[ops.LoraBatch | None, list[ExtraRows]]:
            batch = lora_batch(np.full(num, slot, np.int32), np.full(num, scale, np.float32), device)
            rows = np.arange(num)
            return batch, [extra_rows(own, rows, np.ones(num, bool), scale, device)] if own else []

        self.model.context.of_all = of_all
        self.model.context.lora, self.model.context.extras = of_all(len(batch.texts[index]))

    def _set_head_adapters(self, batch: TextBatch, members: Sequence[int]) -> None:
        """Set the adapters of the head's rows, which belong to some of a batch's texts."""
        context, device = self.model.context, self.model.device
        requests = [batch.requests[i] for i in members]
        slots = np.array([batch.slots[i] for i in members], np.int32)
        scales = np.array([request.lora_scale for request in requests], np.float32)
        context.lora_logits = lora_batch(slots, scales, device)
        context.extras_logits = []
        for (digest, scale), own in group_by_adapter(requests, self.adapters.extras).items():
            rows, active = np.array(own), np.ones(len(own), bool)
            context.extras_logits.append(extra_rows(self.adapters.extras[digest], rows, active, scale, device))

    def _num_virtual(self, request: EngineRequest) -> int:
        """Return the number of virtual tokens that a request's adapter puts before its text."""
        extras = self.adapters.extras.get(request.digest)
        return 0 if extras is None else extras.num_virtual

    def _num_labels(self, request: EngineRequest) -> int:
        """Return the number of labels of the head that answers a request: its adapter's own, or the base's."""
        extras = self.adapters.extras.get(request.digest)
        own = None if extras is None else extras.linear.get(self._label_site)
        return self.model.width if own is None or own.weight is None else len(own.weight)

    # ------------------------------------------------------------ requests

    def add(self, request: EngineRequest) -> None:
        """Accept a request; see `BaseEngine.add`."""
        held = self._requests.get(request.rid)
        if held is not None and held.epoch >= request.epoch:
            return
        self._drop(request.rid)
        if request.output:  # one script writes a result and the request's end, so neither exists without the other
            self._outputs.append(TokenOutput(request.rid, request.epoch, len(request.output), finish="stop"))
            return
        try:
            self._check(request)
        except BaseException as error:  # noqa: BLE001  a request's edge: it fails alone
            self._outputs.append(TokenOutput.failed(request, failure_of(request, error)))
            return
        self._note_taken(request)
        self._requests[request.rid] = request

    def _check(self, request: EngineRequest) -> None:
        """Raise BadRequest for what no step can compute."""
        if request.task != self.model.task:
            raise BadRequest(f"this worker's model does {self.model.task}; it does not {request.task}")
        if not 0 <= request.second < max(1, len(request.prompt)):
            raise BadRequest("the second text of a pair begins outside the tokens", param="input")
        if not len(request.prompt):
            raise BadRequest("the text is empty", param="input")
        if len(request.prompt) > self.config.max_model_len:
            raise BadRequest(
                f"the text has {len(request.prompt)} tokens, this model takes at most {self.config.max_model_len}",
                code="context_length_exceeded",
            )

    def _held(self) -> Collection[str]:
        return self._requests.keys()

    def _waiting(self) -> Iterable[EngineRequest]:
        return self._requests.values()

    def _fail_waiting(self, rid: str, error: LorafleetError) -> None:
        self._outputs.append(TokenOutput.failed(self._requests[rid], error))
        self._drop(rid)

    def _drop(self, rid: str) -> None:
        self._requests.pop(rid, None)
        self._num_skips.pop(rid, None)

    def stats(self) -> m.WorkerBeat:
        """Return the engine's current figures."""
        return self._stats(
            capacity=self.config.max_num_seqs,
            waiting=len(self._requests),
        )


def _output(request: EngineRequest, found: np.ndarray) -> TokenOutput:
    """Return a request's result in its log's format (int32), or an error if it is not finite."""
    values = found[1::2].view(np.float32) if request.task == "classify" else found.view(np.float32)
    if not np.isfinite(values).all():
        return TokenOutput.failed(request, Internal("the model's output is not finite"))
    return TokenOutput(request.rid, request.epoch, 0, found.tolist(), finish="stop")
