"""Scheduler, worker and store in one task, for tests of the gateway: emits scripted tokens by the real Lua scripts."""

from __future__ import annotations

import asyncio
import json
import math
import struct
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import httpx2
import msgspec
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from gateway.service import GatewayTimings, serve
from helpers.reported import report
from helpers.waiting import wait_until
from peft_adapters.texts.tokenizer_json import BaseTokens
from protocol.queue.bus import CONNECTION_ERRORS, Bus, StepResult, StepRow, decode, now_ms
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.error_codec import error_json
from protocol.wire.errors import LorafleetError
from protocol.wire.keys import CLASSES
from protocol.wire.text import OutputText, StopRule
from protocol.wire.tokens import TokenTable

BASE_NAME = "tiny/base"
MAX_MODEL_LEN = 256


@lru_cache
def _table_of(tokenizer: Tokenizer) -> TokenTable:
    return BaseTokens(tokenizer.to_str()).table


CORPUS = "the quick brown fox jumps over the lazy dog and the dog sleeps in the sun all day long"
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_model_folder(folder: Path, template: str = TEMPLATE) -> Path:
    """Write the files a gateway reads: a byte-level tokenizer with few merges, so that characters span tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)],
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS] * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1]}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (folder / "chat_template.jinja").write_text(template)
    return folder


@dataclass(slots=True)
class Script:
    """The worker's output for one request."""

    text: str = "Hello wörld 😀, how are you?"
    finish: str = "stop"
    eos: bool = True  # end with the end-of-text token, if there is space
    chunk: int = 1  # tokens per step
    error: LorafleetError | None = None
    logprob: float = -0.5  # of every token
    numbers: list[int] = field(default_factory=list)  # int32, an encoder's output in place of tokens
    hold_after: int | None = None  # number of tokens after which the request waits for `ScriptedFleet.go`


Scripter = Callable[[m.RequestHead, m.Body], Script]


@dataclass(slots=True)
class ScriptedFleet:
    """A worker and its scheduler. seen: the submitted requests."""

    bus: Bus
    tokenizer: Tokenizer
    script: Scripter = lambda submit, body: Script()
    seen: list[tuple[m.RequestHead, m.Body]] = field(default_factory=list)
    go: asyncio.Event = field(default_factory=asyncio.Event)
    assigning: asyncio.Event = field(default_factory=asyncio.Event)  # while cleared, requests stay in the queue
    wid: str = "w1"
    max_model_len: int = MAX_MODEL_LEN
    beating: bool = True
    _beat_turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    resident: list[str] = field(default_factory=list)
    host: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)  # extra fields of the base model's record

    def prompt(self, index: int = -1) -> str:
        """Return the prompt of a submitted request, including special tokens."""
        ids = memoryview(self.seen[index][1].prompt).cast("i").tolist()
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    async def register(self, *, worker: bool = True) -> None:
        """Publish the base model and one worker's heartbeat."""
        base = m.ServedModel(
            model=BASE_NAME, name=BASE_NAME, fingerprint="f00d", model_type="tiny",
            vocab_size=self.tokenizer.get_vocab_size(), max_model_len=self.max_model_len, sites=[], created_ms=now_ms(),
        )  # fmt: skip
        await report(self.bus, msgspec.structs.replace(base, **self.facts))
        await self.bus.streams.create(self.bus.keys.work(self.wid), 300)
        await self.bus.streams.create(self.bus.keys.ctl(self.wid), 300)
        if worker:
            await self.beat()

    async def set_context(self, gateway: httpx2.URL, num_tokens: int) -> None:
        """Change the model's context length, and wait until a gateway has read it."""
        self.max_model_len = num_tokens
        await self.register()

        async def is_seen() -> bool:
            (base, *_) = (await client.get("/v1/models")).json()["data"]
            return base["max_model_len"] == num_tokens

        async with httpx2.AsyncClient(base_url=gateway, timeout=30) as client:
            await wait_until(is_seen, "the gateway has seen the model", every_s=0.05)

    async def beat(self) -> None:
        beat = m.WorkerBeat(wid=self.wid, name=self.wid, capacity=64, resident=self.resident, host=self.host)
        await self.bus.members.beat(
            self.bus.keys.worker_beat(self.wid), self.bus.keys.workers, self.wid, m.encode(beat), 4000
        )

    async def add_adapter(
        self, name: str, digest: str = "", *, state: m.AdapterState = "on_disk", reason: str = "", **facts: Any
    ) -> None:
        """Write an adapter into the catalogue, as the store does. facts: further fields of its record."""
        alias = m.Alias(name=name, state=state, digest=digest, source=f"local:{name}", reason=reason, created_ms=1000)
        record = None
        if digest:
            record = m.AdapterRecord(
                digest=digest, source=f"local:{name}", created_ms=1,
                **{"rank": 8, "num_bytes": 10, "config": {}, "modules": ["q_proj"], **facts},
            )  # fmt: skip
        await self.bus.adapters.publish([(alias, record)])

    async def cancel(self, http: httpx2.AsyncClient, response_id: str) -> Any:
        """Cancel a response of the background and return it; its worker goes on when the queue knows that."""
        asking = asyncio.create_task(http.post(f"/v1/responses/{response_id}/cancel"))
        request = self.bus.keys.req(f"{response_id.removeprefix('resp_')}-0")

        async def is_known() -> bool:
            return asking.done() or await self.bus._redis.hget(request, "cancel") == b"1"

        await wait_until(is_known, "the queue knows of the cancellation")
        self.go.set()
        answer = await asking
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def run(self) -> None:
        """Serve requests until cancelled."""
        last = {self.bus.keys.sub(cls): b"0" for cls in CLASSES}
        async with asyncio.TaskGroup() as group:
            group.create_task(self._beats())
            while True:
                try:
                    read = await self.bus.streams.read(last, block_ms=200)
                except CONNECTION_ERRORS:  # the queue's server did not get CPU time: try again, as a worker does
                    continue
                for entries in read.values():
                    for _, fields in entries:
                        submit = decode(fields[b"b"], m.RequestHead)
                        group.create_task(self._play(submit, int(fields[b"e"])))

    async def stop_beating(self) -> None:
        """Stop the heartbeats; none is in flight afterwards."""
        self.beating = False
        async with self._beat_turn:
            pass

    async def _beats(self) -> None:
        while True:
            async with self._beat_turn:
                if self.beating:
                    await self.beat()
            await asyncio.sleep(1)

    async def _play(self, submit: m.RequestHead, epoch: int) -> None:
        shared = (await self.bus.inputs([submit]))[0].body()
        if shared is None:  # cancelled before it was read: its inputs are deleted
            return
        body = msgspec.structs.replace(shared, sampling=shared.sampling.of_choice(submit.choice))
        self.seen.append((submit, body))
        await self.assigning.wait()
        order = m.Assigned(submit.rid, epoch + 1, submit.digest, submit.tenant, submit.gateway, submit.stored)
        if (await self.bus.assign(self.wid, [(order, epoch)]))[0] != "ok":
            return
        script = self.script(submit, body)
        ids, finish = self.tokens(script, body)
        sent = 0
        while True:
            if script.hold_after is not None and sent >= script.hold_after:
                await self.go.wait()
            size = min(script.chunk, len(ids) - sent)
            last = sent + size >= len(ids)
            if not await self.step(
                order,
                sent,
                ids[sent : sent + size],
                body,
                end=finish if last else "",
                error=script.error,
                logprob=script.logprob,
            ):
                return
            sent += size
            if last:
                return

    async def step(
        self,
        order: m.Assigned,
        seq0: int,
        ids: list[int],
        body: m.Body,
        *,
        end: str,
        error: LorafleetError | None = None,
        logprob: float = -0.5,
    ) -> bool:
        """Write one step of one request. Return False if it was refused. Ends a cancelled request."""
        raw = array("i", ids).tobytes()
        s = body.sampling
        records = b"".join(
            logprob_record(id_, s.num_logprobs, logprob, listed=s.logprob_token_ids, size=s.vocabulary) for id_ in ids
        )
        info = error_json(error) if end else ""
        finish = "error" if info else end
        state = {"": "", "error": "failed"}.get(finish, "completed")
        usage = m.RequestUsage(len(body.prompt) // 4, seq0 + len(ids), 3) if end else None
        row = StepRow(order.rid, order.epoch, seq0, raw, records, state, finish, info, num_cached=3 if end else 0)
        if s.prompt_logprobs is not None and not seq0:
            prompt = memoryview(body.prompt).cast("i")
            made = {id_: logprob_record(id_, s.prompt_logprobs, rank=7, size=s.vocabulary) for id_ in set(prompt)}
            row.prompt_logprobs = (
                body.prompt + struct.pack("<f", math.nan) + b"".join(map(made.__getitem__, prompt))[4:]
            )
        delta = m.Delta(order.rid, order.epoch, seq0, raw, records, finish=finish, error=info, usage=usage)
        outs = {order.gateway: [delta]} if order.gateway else {}
        refused = await self.bus.step(self.wid, StepResult([row], outs))
        if refused and refused[0].code == "cancelled":
            row = StepRow(order.rid, order.epoch, seq0, b"", b"", "cancelled", "cancelled")
            delta = m.Delta(order.rid, order.epoch, seq0, finish="cancelled")
            await self.bus.step(self.wid, StepResult([row], {order.gateway: [delta]} if order.gateway else {}))
        return not refused

    def tokens(self, script: Script, body: m.Body) -> tuple[list[int], str]:
        """Return a request's output and finish reason: what a worker with the same stop rules makes of the script."""
        if script.numbers:
            return script.numbers, script.finish
        wanted = self.tokenizer.encode(script.text).ids + ([1] if script.eos else [])
        rule = StopRule.of(body.stop, body.stop_token_ids, body.sampling, frozenset([1]))
        output = OutputText(_table_of(self.tokenizer), rule)
        for i, id_ in enumerate(wanted):
            output.add([id_])
            if output.ended:
                return wanted[: i + 1], "stop"
            if i + 1 == body.max_new_tokens:
                return wanted[: i + 1], "length"
        return wanted, script.finish


@asynccontextmanager
async def playing(url: str, model: Path | Tokenizer, **options: Any) -> AsyncIterator[ScriptedFleet]:
    """Register a scripted fleet in the queue at `url`, and run it on its own connection during the block."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json")) if isinstance(model, Path) else model
    own = Bus(url)
    fleet = ScriptedFleet(own, tokenizer, **options)
    fleet.assigning.set()
    await fleet.register()
    task = asyncio.create_task(fleet.run())
    try:
        yield fleet
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await own.close()


def logprob_record(
    id_: int, num_top: int | None, logprob: float = -0.5, *, rank: int | None = None, listed: Sequence[int] = (),
    size: int = 0,
) -> bytes:  # fmt: skip
    """Return a token's logprob record: `logprob` for itself, then `listed` or the following ids with -1, -2, ...

    size: of the vocabulary, if all of it is requested; id 0 then follows the last id.
    """
    if num_top is None:
        return b""
    if num_top == m.WHOLE and not listed:
        head = struct.pack("<f", logprob) + (b"" if rank is None else struct.pack("<i", rank))
        return head + array("f", [-1.0 - (other - id_) % size for other in range(size)]).tobytes()
    ids = listed or range(id_, id_ + num_top)
    top = [value for i, other in enumerate(ids, 1) for value in (other, -1.0 * i)]
    ranks = [] if rank is None else [rank]
    return struct.pack("<f" + "i" * len(ranks) + "if" * num_top, logprob, *ranks, *top)


@dataclass(slots=True)
class RunningGateway:
    """A gateway on a free port, in this process."""

    url: str
    gid: str
    stop: asyncio.Event
    task: asyncio.Task[int]

    def client(self, **options: Any) -> httpx2.AsyncClient:
        """Return a client with a timeout long enough for a busy machine."""
        return httpx2.AsyncClient(base_url=self.url, timeout=120, **options)


@asynccontextmanager
async def running_gateway(
    bus: Bus, model: Path, timings: GatewayTimings | None = None, **settings: object
) -> AsyncIterator[RunningGateway]:
    """Start a gateway; drain it after the block."""
    before = set(await bus.members.ids(bus.keys.gateways))
    stop = asyncio.Event()
    values = {"redis_url": bus.url, "model": str(model), "port": 0, "grace_s": 5.0, **settings}
    async with asyncio.TaskGroup() as group:
        task = group.create_task(serve(Settings(**values), stop, timings))  # type: ignore[arg-type]

        async def came_up() -> str | None:
            assert not task.done(), "the gateway ended"
            return next(iter(set(await bus.members.ids(bus.keys.gateways)) - before), None)

        gid = await wait_until(came_up, "a gateway has come up")
        address = await bus._redis.get(bus.keys.gateway_beat(gid))
        try:
            yield RunningGateway(address.decode(), gid, stop, task)
        finally:
            stop.set()


@asynccontextmanager
async def gateway_client(
    bus: Bus,
    model: Path,
    timings: GatewayTimings | None = None,
    *,
    key: str = "",
    **settings: object,
) -> AsyncIterator[httpx2.AsyncClient]:
    """Start a gateway like `running_gateway`, and yield a client for it. key: API key to send, if any."""
    headers = {"authorization": f"Bearer {key}"} if key else None
    async with running_gateway(bus, model, timings, **settings) as gateway, gateway.client(headers=headers) as http:
        yield http
