"""Repeats steps of one kind for `profile.py`: the engine runs them, and each is published on a real queue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from itertools import count

import numpy as np

from gpu_worker.engine.engine import Engine
from gpu_worker.planning.request import EngineRequest, TokenOutput
from gpu_worker.service.outbox import Outbox, add_outputs
from gpu_worker.service.owned import OwnedRequest, PendingOutput
from protocol.queue.bus import Bus, now_ms
from protocol.runtime.settings import BLOCK_TOKENS
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest, Internal

GATEWAY, WORKER, TENANT = "g-profile", "w-profile", "profile"
GREEDY = m.Sampling(temperature=0.0, ignore_eos=True)
LIFE_S = 3600


class Queue:
    """A queue on which steps are published like a worker's service does."""

    def __init__(self, url: str) -> None:
        """url: of a queue without other users."""
        self._runner = asyncio.Runner()
        self._bus = Bus(url)
        self._outbox = Outbox(WORKER)
        self._numbers = count()
        self.publish_s = 0.0

    def next_id(self) -> str:
        """Return a new request id."""
        return f"profile-{next(self._numbers)}"

    def own(self, requests: Sequence[EngineRequest]) -> None:
        """Submit requests, assign them to this worker, and own them. Raises Internal if the queue refuses."""
        self._runner.run(self._own(requests))

    async def _own(self, requests: Sequence[EngineRequest]) -> None:
        bus, keys = self._bus, self._bus.keys
        await bus.streams.create(keys.work(WORKER), LIFE_S)
        await bus.streams.create(keys.out(GATEWAY), LIFE_S)
        pairs = [(_submission(request), _body(request)) for request in requests]
        status, _ = await bus.submit("interactive", pairs, max_queued=len(requests) + 1)
        if status == "ok":
            batch = [(m.Assigned(r.rid, r.epoch, r.digest, TENANT, GATEWAY), r.epoch - 1) for r in requests]
            status, _ = await bus.assign(WORKER, batch)
        if status != "ok":
            raise Internal(f"the queue says {status!r} to the profile's requests")
        entry = (await bus.streams.entries(keys.work(WORKER)))[-1][0]
        self._outbox.take(
            entry, [OwnedRequest(r.rid, r.epoch, entry, GATEWAY, TENANT, len(r.prompt), 0) for r in requests]
        )

    def publish(self, outputs: Iterable[TokenOutput]) -> None:
        """Make a step durable and visible, and add the elapsed time to `publish_s`. Raises Internal if refused."""
        started = time.perf_counter()
        pending: dict[str, PendingOutput] = {}
        add_outputs(pending, outputs)
        step = self._outbox.build(pending)
        refused = self._runner.run(self._bus.step(WORKER, step))
        if refused:
            raise Internal(f"the queue refused {len(refused)} rows of a step")
        self._outbox.commit(step, pending)
        self.publish_s += time.perf_counter() - started

    def close(self) -> None:
        """Close the connection."""
        self._runner.run(self._bus.close())
        self._runner.close()


def _submission(request: EngineRequest) -> m.RequestHead:
    return m.RequestHead(
        rid=request.rid, tenant=TENANT, cls="interactive", digest=request.digest, num_prompt_tokens=len(request.prompt),
        max_new_tokens=request.max_new_tokens, deadline_ms=now_ms() + 1000 * LIFE_S, gateway=GATEWAY,
    )  # fmt: skip


def _body(request: EngineRequest) -> m.Body:
    prompt = request.prompt.astype("<i4").tobytes()
    return m.Body(prompt=prompt, sampling=request.sampling, max_new_tokens=request.max_new_tokens)


class Decode:
    """Steps in which every sequence gets its next token."""

    kind = "decode"

    def __init__(self, engine: Engine, queue: Queue, names: Sequence[str], prompt_tokens: int) -> None:
        """names: each sequence's adapter, "" for the base model. prompt_tokens: tokens of each prompt."""
        self.engine = engine
        self.queue = queue
        self.names = names
        self._prompt_tokens = prompt_tokens
        self._rids: list[str] = []

    @property
    def num_sequences(self) -> int:
        """Sequences in a step."""
        return len(self.names)

    def check_room(self, num_steps: int) -> None:
        """Raise BadRequest if the engine cannot run all sequences at once for `num_steps` steps."""
        config, number = self.engine.config, self.num_sequences
        if number > config.limits.max_num_seqs:
            raise BadRequest(f"--sequences: {number} is over max_num_seqs, {config.limits.max_num_seqs}")
        # The first sequences already decode while the last prompts are computed.
        num_prefills = -(-number * self._prompt_tokens // (config.limits.max_step_tokens - number + 1))
        num_tokens = self._prompt_tokens + num_prefills + num_steps
        if num_tokens > config.max_model_len:
            raise BadRequest(
                f"prompt and steps total {num_tokens} tokens a sequence, max_model_len is {config.max_model_len}"
            )
        num_blocks = number * (1 - (-num_tokens // BLOCK_TOKENS))  # one more each, which the batcher keeps free
        if num_blocks > config.num_blocks:
            raise BadRequest(
                f"{number} sequences need {num_blocks} KV blocks, kv_cache_bytes holds {config.num_blocks}"
            )

    def start(self) -> None:
        """Submit all sequences and run steps until every one decodes."""
        self._rids = self._ask(self.engine.config.max_model_len - self._prompt_tokens)
        while any(seq.num_output == 0 for seq in self.engine.batcher):
            self._step()

    def run(self, num_steps: int) -> None:
        """Run steps. Raises Internal if one leaves out a sequence."""
        for _ in range(num_steps):
            if self._step() != self.num_sequences:
                raise Internal("a decode step left a sequence out")

    def end(self) -> None:
        """Cancel the requests."""
        for rid in self._rids:
            self.engine.cancel(rid)

    def _ask(self, max_new_tokens: int) -> list[str]:
        """Give the engine one request per sequence, with random prompts that are not cached; return their ids."""
        vocab, rng = self.engine.model.vocab_size, np.random.default_rng()
        requests: list[EngineRequest] = []
        for name in self.names:
            prompt = rng.integers(vocab, size=self._prompt_tokens).astype(np.int32)
            requests.append(EngineRequest(self.queue.next_id(), 1, name, prompt, GREEDY, max_new_tokens))
        self.queue.own(requests)
        for request in requests:
            self.engine.add(request)
        return [request.rid for request in requests]

    def _step(self) -> int:
        """Run one step and publish it; return the number of sequences that got a token."""
        outputs = self.engine.step()
        for output in outputs:
            if output.error is not None:
                raise output.error
        if outputs:
            self.queue.publish(outputs)
        return len(outputs)


class Prefill(Decode):
    """Steps that compute prompts up to a step's token budget, in rounds of one prompt per sequence."""

    kind = "prefill"

    def start(self) -> None:
        """Do nothing: no step differs from the others."""

    def run(self, num_steps: int) -> None:
        """Run whole rounds until at least `num_steps` steps are done."""
        last = self.engine.counters.num_steps + num_steps
        while self.engine.counters.num_steps < last:
            self._ask(1)
            while self.engine.has_work:
                self._step()
