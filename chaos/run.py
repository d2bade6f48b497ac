"""One run: clients, faults, and the check of everything, compared with the answers of the fleet before any fault."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from chaos import check
from chaos.attackers.attacker import HUNG, Attacker
from chaos.attackers.attacks import BODY_ATTACKS
from chaos.attackers.webhook_attacks import WEBHOOK_ATTACKS
from chaos.attackers.wire_attacks import WIRE_ATTACKS
from chaos.bases import MAX_SWAP_WAIT_S, MIN_RESIDENCY_S, Turns, all_served, num_swaps
from chaos.clients.asks import Ask, Expected, Transformers, catalogue, decidable, one_ask, vector_asks, vectors
from chaos.clients.batches import BatchClient
from chaos.clients.client import GIVE_UP_S, STYLES, Attempt, Call, Client
from chaos.clients.files import FileClient, Round, UploadClient, zipped
from chaos.clients.insistent import Insistent
from chaos.clients.responses import ResponseClient
from chaos.clients.webhooks import MAX_REFUSALS, Receiver, receiving
from chaos.faults import Havoc, Hit
from chaos.fleet import ProcessFleet, Shape
from chaos.replicated import FAILOVERS, ReplicatedQueue
from chaos.shortage import Clocks
from chaos.usage import Books, wrong_usage
from protocol.queue.bus import CONNECTION_ERRORS
from protocol.runtime.service import wait_any
from protocol.wire.keys import CLASSES
from protocol.wire.messages import Delivery

logger = logging.getLogger(__name__)

SETTLE_S = 120.0
"""Maximum seconds until every log must be right: a log that lost its end is repaired in this time."""

UNREACHABLE = ["the queue cannot be reached"]

CLIENTS, PUBLIC = "clients", "public"
"""Tenant of the clients: with API keys, and without."""

HORIZON_S = 5.0
UPLOAD_EVERY_S = 1.0
MAX_ATTEMPTS = 20  # high, since here a worker's death does not mean that its requests caused it
ATTACKS = (*BODY_ATTACKS, *WIRE_ATTACKS, *WEBHOOK_ATTACKS)


@dataclass(frozen=True, slots=True)
class Plan:
    """The parameters of a run."""

    num_faults: int
    every_s: float
    num_clients: int
    seed: int
    max_s: float
    shape: Shape
    alone: bool = False  # one fault at a time
    kills_only: bool = False  # once each fault was inflicted
    num_lines: int = 0  # lines per batch; a client runs batches one after the other; 0: there is no such client
    num_adapters: int = 0  # adapters that only batch lines use; 0: lines ask what clients ask
    num_turns: int = 0  # turns per conversation; a client holds them one after the other; 0: there is no such client
    only: str = ""  # the kind of members to hit; "": all
    replicated: bool = False  # the queue is three servers watched by Sentinels; its faults are failovers
    hows: tuple[str, ...] = ()  # faults to inflict; (): all
    clocks: bool = False  # the members' clocks jump
    stores: bool = False  # clients also store files and upload adapters
    num_attackers: int = 0  # more than 0 turns API keys on; attackers are another tenant than the clients
    more_bases: tuple[str, ...] = ()  # names of base models besides the first; each has one adapter, `of-` and its name
    encoder: str = ""  # which of `more_bases` is an encoder; "": none

    def models(self, names: Sequence[str]) -> dict[str, str]:
        """Return model name -> its base for all models that clients ask; `names` are adapters of the first base."""
        further = {model: base for base in self.more_bases for model in (base, f"of-{base}")}
        return dict.fromkeys(["base", *names], "base") | further

    @property
    def is_cabled(self) -> bool:
        """Whether the queue's servers are behind cables that can be cut."""
        return not self.hows or bool({"partition", "split"} & set(self.hows))


@dataclass(slots=True)
class Tally:
    """The results of a run."""

    violations: list[str] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)  # style -> completely answered calls
    told: Counter[str] = field(default_factory=Counter)  # error codes of unfinished attempts
    attacks: Counter[str] = field(default_factory=Counter)  # name -> rounds
    num_lost_batches: int = 0  # new batches that a queue which lost power has forgotten
    num_unclear: int = 0  # conversations and files that a queue which lost power may have partly lost
    pauses: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))  # s, per kind and how
    num_tokens: int = 0
    hits: list[Hit] = field(default_factory=list)
    elapsed_s: float = 0.0
    rss_mb: dict[str, tuple[float, float]] = field(default_factory=dict)  # of each process, at the start and at the end
    num_dead_letters: int = 0
    num_ended: int = 0  # jobs and batches whose end clients saw, and a webhook had to report
    num_webhooks: int = 0  # delivered and not refused
    num_swaps: int = 0
    silences_s: dict[str, float] = field(default_factory=dict)  # base -> longest silence after the faults, s


class Run:
    """Clients and checks against one fleet."""

    def __init__(
        self, fleet: ProcessFleet, plan: Plan, asks: list[Ask], keys: Sequence[str] = ("", "", ""),
        lines: Sequence[Ask] = (), receiver: Receiver | None = None,
    ) -> None:  # fmt: skip
        """keys: the API keys of the clients, of the attackers, and of an operator; "" without keys.

        lines: the asks of batches, () for those of clients. receiver: receives webhooks.
        """
        self.fleet = fleet
        self.plan = plan
        self.asks = asks
        self._texts = [ask for ask in asks if ask.num_tokens]
        self._lines = lines or self._texts
        self._receiver = receiver
        self._ended: dict[tuple[str, str], float] = {}  # (event type, id) -> when a client saw the end
        self.expected: dict[Ask, Expected] = {}
        self._vectors: dict[Ask, tuple[float, ...]] = {}
        self.tally = Tally()
        self.havoc = Havoc(fleet, random.Random(plan.seed), kills_only=plan.kills_only, only=plan.only, hows=plan.hows)
        self._client_key, self._attacker_key, self._operator_key = keys
        self._turns = Turns(plan.models([ask.model for ask in asks if ask.model not in plan.models(())]))
        self._books = Books()
        self._client = Client(fleet.urls, self._client_key)
        self._checks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Close the client's connections."""
        await self._client.close()

    # ------------------------------------------------------------ before the faults

    async def ask_undisturbed(self, answers: dict[Ask, list[int]], vectors: dict[Ask, tuple[float, ...]]) -> None:
        """Ask everything once, for the answers expected under faults. They must be those of transformers."""
        self._vectors = vectors
        room = asyncio.Semaphore(8)
        asks = list(dict.fromkeys([*self.asks, *self._lines]))
        found = await asyncio.gather(*(self._ask_once(ask, room) for ask in asks))
        self.expected = dict(zip(asks, found, strict=True))
        for ask, ids in answers.items():
            if list(memoryview(self.expected[ask].ids).cast("i")) != ids:
                raise RuntimeError(f"transformers answers {ask} in another way")

    async def _ask_once(self, ask: Ask, room: asyncio.Semaphore) -> Expected:
        async with room:
            call = Call(ask, "stream" if ask.num_tokens else "vector", time.monotonic())
            await self._client.ask(ask, call.style, call)
        attempt = call.attempts[-1]
        if not call.is_complete or len(call.attempts) > 1:
            raise RuntimeError(f"undisturbed, {ask} was not answered: {attempt.code} {attempt.detail}")
        ids = await self.fleet.bus.tokens(f"{attempt.call}-0") or b""
        expected = Expected(attempt.text, ids, attempt.usage["prompt_tokens"], vector=self._vectors.get(ask, ()))
        if wrong := check.shown_wrongly(attempt, expected):
            raise RuntimeError(f"undisturbed, {ask} was answered wrongly: {wrong}")
        self._books.note(call, expected)
        return expected

    # ------------------------------------------------------------ under faults

    async def run(self) -> Tally:
        """Inflict the faults under load; when this returns, everything has been checked."""
        stop, enough, began_s = asyncio.Event(), asyncio.Event(), time.monotonic()
        before = self._rss()
        self.tally.hits = self.havoc.hits
        async with asyncio.TaskGroup() as group:
            for number in range(self.plan.num_clients):
                group.create_task(self._be_client(number, stop))
            if self.plan.num_lines:
                group.create_task(self._run_batches(stop))
            if self.plan.num_turns:
                group.create_task(self._run_conversations(stop))
            if self.plan.stores:
                group.create_task(self._store_files(stop))
                group.create_task(self._upload_adapters(stop))
            for number in range(self.plan.num_attackers):
                group.create_task(self._be_attacker(number, stop))
            timer = asyncio.get_running_loop().call_later(self.plan.max_s, enough.set)  # clients continue
            await self.havoc.run(self.plan.num_faults, self.plan.every_s, enough, alone=self.plan.alone)
            timer.cancel()
            if self.plan.more_bases:
                self.tally.violations += await self._turns.watch(self.fleet, len(self.plan.shape.workers))
                self.tally.silences_s = self._turns.silences_s
            stop.set()
        self.tally.elapsed_s = time.monotonic() - began_s
        await asyncio.gather(*self._checks)
        self.tally.violations += self.havoc.troubles
        after = self._rss()
        self.tally.rss_mb = {name: (before[name], after.get(name, 0.0)) for name in before}
        await self._check_end()
        self.tally.num_swaps = await num_swaps(self.fleet)
        return self.tally

    async def _be_client(self, number: int, stop: asyncio.Event) -> None:
        rng, asks = random.Random(f"{self.plan.seed} {number}"), self._turns.asks_of(number, self.asks)
        while not stop.is_set():
            ask, style = rng.choice(asks), rng.choice(STYLES)
            call = Call(ask, style if ask.num_tokens else "vector", time.monotonic())
            await self._client.ask(call.ask, call.style, call)
            self._take(call)

    async def _run_batches(self, stop: asyncio.Event) -> None:
        """Run one batch after the other; the last one ends after the faults."""
        rng = random.Random(f"{self.plan.seed} batches")
        expected = {ask: self.expected[ask] for ask in self._lines}
        client = BatchClient(self.fleet.urls, self._client_key, expected)
        try:
            while not stop.is_set():
                wrong = await client.run(self.plan.num_lines, rng)
                if wrong is None:
                    self.tally.num_lost_batches += 1
                    continue
                self.tally.violations += [f"batch: {what}" for what in wrong]
                self.tally.calls["batch"] += self.plan.num_lines
        finally:
            self._ended |= dict.fromkeys(client.ended, -math.inf)  # a power cut cannot lose a batch's end
            await client.close()

    async def _run_conversations(self, stop: asyncio.Event) -> None:
        """Hold one conversation after the other; the last one ends after the faults."""
        rng = random.Random(f"{self.plan.seed} conversations")
        client = ResponseClient(self.fleet.urls, self._client_key, sorted({ask.model for ask in self._texts}))
        try:
            while not stop.is_set():
                told = await client.converse(self.plan.num_turns, rng)
                self.tally.violations += [f"conversation: {what}" for what in told.doubled]
                if self._had_no_power(told.began_s - 5, told.ended_s):
                    self.tally.num_unclear += 1
                    continue
                self.tally.violations += [f"conversation: {what}" for what in told.wrong]
                self.tally.calls["turn"] += len(told.ends)
                self._ended |= dict.fromkeys(told.ends, told.ended_s)
        finally:
            await client.close()

    async def _store_files(self, stop: asyncio.Event) -> None:
        """Store, read and delete one file after the other."""
        rng = random.Random(f"{self.plan.seed} files")
        http = Insistent(self.fleet.urls, self._client_key)
        client = FileClient(http)
        try:
            while not stop.is_set():
                self._take_round("file", await client.once(rng))
        finally:
            await http.close()

    async def _upload_adapters(self, stop: asyncio.Event) -> None:
        """Upload one adapter after the other under the same name, and ask it."""
        rng = random.Random(f"{self.plan.seed} uploads")
        expected = {ask: self.expected[ask] for ask in self._texts}
        adapters = self.fleet.folder / "adapters"
        zips = {name: zipped(adapters / name) for name in {ask.model for ask in expected} if (adapters / name).is_dir()}
        http = Insistent(self.fleet.urls, self._operator_key)
        client = UploadClient(http, zips, expected)
        try:
            while not stop.is_set():
                self._take_round("upload", await client.once(rng))
                await wait_any(stop, UPLOAD_EVERY_S)
        finally:
            await http.close()

    def _take_round(self, what: str, told: Round) -> None:
        if told.wrong and self._had_no_power(told.began_s - 5, told.ended_s):
            self.tally.num_unclear += 1
            return
        self.tally.violations += [f"{what}: {wrong}" for wrong in told.wrong]
        self.tally.calls[what] += told.num_calls

    async def _be_attacker(self, number: int, stop: asyncio.Event) -> None:
        """Run one attack after the other. Answers that an attacker gets matter only if they are faults."""
        rng = random.Random(f"{self.plan.seed} attacker {number}")
        while not stop.is_set():
            attack = rng.choice(ATTACKS)
            attacker = Attacker(rng.choice(self.fleet.urls), self._attacker_key, GIVE_UP_S)
            try:
                await attack.once(attacker)
            finally:
                await attacker.close()
            self.tally.attacks[attack.name] += 1
            wrong = [what for what in attacker.told if what == HUNG or "internal_error" in what or "in JSON" in what]
            self.tally.violations += [f"the attack `{attack.name}` was told: {what}" for what in wrong]

    def _take(self, call: Call) -> None:
        tally, expected = self.tally, self.expected[call.ask]
        for attempt in call.attempts:
            wrong = check.shown_wrongly(attempt, expected)
            if reason := check.unexcused(attempt, self.havoc.hits[-200:]):
                wrong.append(reason)
            self._accuse(call, attempt, wrong)
            if attempt.outcome != "complete":
                tally.told[attempt.code or attempt.outcome] += 1
        if call.is_complete:
            tally.calls[call.style] += 1
            self._turns.note(call.ask.model, call.attempts[-1].ended_s)
            tally.num_tokens += expected.num_tokens
            if call.style == "job":
                self._ended["job.completed", f"job_{call.attempts[-1].call}"] = call.attempts[-1].ended_s
        else:
            self._accuse(call, call.attempts[-1], ["was never answered"])
        self._note_pauses(call)
        self._books.note(call, expected)
        task = asyncio.create_task(self._check_logs(call))
        self._checks.add(task)
        task.add_done_callback(self._checks.discard)

    def _note_pauses(self, call: Call) -> None:
        if "stream" not in call.style:
            return
        rids = {f"{attempt.call}-0" for attempt in call.attempts}
        urls = {attempt.url for attempt in call.attempts}
        for hit in self.havoc.hits[-200:]:
            concerned = {"worker": bool(rids & hit.rids), "gateway": hit.url in urls}.get(hit.kind, True)
            pause_s = check.longest_pause(call, hit.at_s, HORIZON_S) if concerned else None
            if pause_s is not None:
                self.tally.pauses[hit.kind, hit.how].append(pause_s)

    def _accuse(self, call: Call, attempt: Attempt, wrong: list[str]) -> None:
        for what in wrong:
            after_s = attempt.ended_s - attempt.began_s
            self.tally.violations.append(f"{call.style} {attempt.call} {call.ask} ({after_s:.1f} s): {what}")
            logger.error("%s", self.tally.violations[-1])

    async def _check_logs(self, call: Call) -> None:
        for attempt in call.attempts:
            if not attempt.call:
                continue
            deadline = time.monotonic() + SETTLE_S
            while wrong := await self._log_faults(attempt, self.expected[call.ask]):
                if time.monotonic() > deadline and wrong is not UNREACHABLE:
                    self._accuse(call, attempt, wrong)
                    break
                await asyncio.sleep(1.0)

    async def _log_faults(self, attempt: Attempt, expected: Expected) -> list[str]:
        bus, rid = self.fleet.bus, f"{attempt.call}-0"
        try:
            (facts,) = await bus.requests([rid])
            ids = await bus.tokens(rid) or b""
        except CONNECTION_ERRORS:
            return UNREACHABLE
        whole = attempt.outcome == "complete" and not self._may_be_forgotten(attempt.ended_s)
        return check.logged_wrongly(expected, facts, ids, whole=whole)

    def _may_be_forgotten(self, ended_s: float) -> bool:
        """Return whether a power cut may have lost the end of a request, with no service left to write it again.

        Faults up to 5 s later count: a power cut also loses writes from shortly before it.
        """
        return self._had_no_power(ended_s - 15, ended_s + 5)

    def _had_no_power(self, from_s: float, to_s: float) -> bool:
        """Return whether a power cut or a failover may have taken the queue's last writes between two times."""
        return any(from_s <= hit.at_s <= to_s for hit in self.havoc.hits if self._loses(hit))

    def _loses(self, hit: Hit) -> bool:
        return hit.how == "power cut" or (hit.kind == "queue" and self.plan.replicated and hit.how in FAILOVERS)

    # ------------------------------------------------------------ after the faults

    async def _check_end(self) -> None:
        """Check that nothing is left: no work, no request without an end, no key without a TTL."""
        deadline = time.monotonic() + SETTLE_S
        while left := await self._left_over():
            if time.monotonic() > deadline:
                self.tally.violations += left
                break
            await asyncio.sleep(0.5)
        self._check_lost_batches()
        self.tally.violations += await wrong_usage(
            self.fleet.bus, CLIENTS if self._client_key else PUBLIC, self._books, self.plan.more_bases,
            may_lack=any(map(self._loses, self.havoc.hits)),
            may_exceed=self.plan.num_turns > 0 or (self.plan.stores and not self._operator_key),
        )  # fmt: skip
        if self._receiver is not None:
            told = {event for event, ended_s in self._ended.items() if not self._may_be_forgotten(ended_s)}
            self.tally.violations += self._receiver.violations
            never, waiting = await self._receiver.missing(told, SETTLE_S), await self._waiting_webhooks()
            self.tally.violations += check.lost_webhooks(never, waiting, MAX_REFUSALS)
            self.tally.num_ended, self.tally.num_webhooks = len(told), self._receiver.arrived.total()
        self.tally.num_dead_letters = await self.fleet.bus.streams.length(self.fleet.bus.keys.dlq)
        if self.tally.num_dead_letters:
            self.tally.violations.append(f"{self.tally.num_dead_letters} dead letters")

    async def _waiting_webhooks(self) -> list[Delivery]:
        return await self.fleet.bus.webhooks.waiting(CLIENTS if self._client_key else PUBLIC)

    def _check_lost_batches(self) -> None:
        cuts = [hit for hit in self.havoc.hits if self._loses(hit)]
        if self.tally.num_lost_batches > len(cuts):
            self.tally.violations.append(f"{self.tally.num_lost_batches} batches are lost after {len(cuts)} power cuts")

    async def _left_over(self) -> list[str]:
        bus = self.fleet.bus
        left = [f"{cls}: queued" for cls in CLASSES if await bus.streams.length(bus.keys.sub(cls))]
        for wid in await bus.members.ids(bus.keys.workers):
            left += [f"{wid} has {item.rid}" for item in await bus.work_of(wid)]
        left += [f"{key} has no life time" for key in await bus.untimed_keys()]
        left += [f"{turn.response} is not added" for turn in await bus.conversations.due(1 << 52, 9)]
        return left + [f"request {rid} is {state}" for rid, state in (await bus.unfinished()).items()]

    def _rss(self) -> dict[str, float]:
        found = {"driver": psutil.Process().memory_info().rss / 1e6}
        found["queue"] = psutil.Process(self.fleet.queue.process.pid).memory_info().rss / 1e6
        for member in self.fleet.members.values():
            if member.is_running:
                found[member.name] = psutil.Process(member.pid).memory_info().rss / 1e6
        return found


@asynccontextmanager
async def prepared(
    plan: Plan, folder: Path, model: Path, names: Sequence[str], of_lines: Sequence[str] = ()
) -> AsyncIterator[Run]:  # fmt: skip
    """Start a fleet with the adapters `names` of `folder`/adapters, ask it everything undisturbed, and yield the run.

    of_lines: adapters that only batch lines use. The fleet ends with the context.
    """
    adapters = folder / "adapters"
    models = plan.models(names)
    decoders = [name for name, base in models.items() if base != plan.encoder]
    asks = catalogue(decoders, random.Random(plan.seed))
    asks_for_vectors = vector_asks(models.keys() - decoders)
    lines = [one_ask(name, number) for number, name in enumerate([*of_lines, *of_lines])]  # one may be undecidable
    oracle = Transformers(model, adapters, [*names, *of_lines])
    first = [*(ask for ask in asks if models[ask.model] == "base"), *lines]
    answers = await asyncio.to_thread(decidable, first, oracle)
    for base in [name for name in plan.more_bases if name != plan.encoder]:
        oracle = Transformers(folder / base, adapters, [f"of-{base}"], base)
        answers |= await asyncio.to_thread(decidable, [ask for ask in asks if models[ask.model] == base], oracle)
    of_encoder = await asyncio.to_thread(vectors, asks_for_vectors, folder / plan.encoder, adapters)
    logger.info("%d of %d asks have an answer that rounding cannot change", len(answers), len(asks) + len(lines))
    async with receiving(plan.seed) as receiver:
        with_keys = plan.num_attackers > 0
        fleet = ProcessFleet.prepare(
            folder, model, adapters, durable=True, max_attempts=MAX_ATTEMPTS, api_keys=with_keys, private_webhooks=True,
            secret=secrets.token_hex(16), names=receiver.names,
            clocks=Clocks(folder / "clocks") if plan.clocks else None,
            queue=ReplicatedQueue(folder / "queue", cabled=plan.is_cabled) if plan.replicated else None,
            more_models=",".join(str(folder / base) for base in plan.more_bases), max_swap_wait_s=MAX_SWAP_WAIT_S,
            min_residency_s=MIN_RESIDENCY_S,
        )  # fmt: skip
        try:
            for name, base in zip(plan.shape.workers, ["", *plan.more_bases], strict=False):
                fleet.add("worker", name, base=base)
            await fleet.start_all(plan.shape)
            create = fleet.bus.api_keys.create
            keys = ["", "", ""]
            if with_keys:
                keys = [(await create(name, ["infer"]))[0] for name in (CLIENTS, "attackers")]
                keys.append((await create("operators", ["infer", "admin"]))[0])
            if plan.more_bases:
                await all_served(fleet, models, 1 + len(plan.more_bases), keys[0])
            known = [ask for ask in asks if ask in answers] + asks_for_vectors
            run = Run(fleet, plan, known, keys, [ask for ask in lines if ask in answers], receiver)
            try:
                logger.info("the fleet is up")
                await receiver.subscribe(fleet.url, keys[0])
                if with_keys:  # its jobs' webhooks go to receivers that never answer from now on, besides the clients'
                    attacker = Attacker(fleet.url, keys[1], GIVE_UP_S)
                    await WEBHOOK_ATTACKS[0].once(attacker)
                    await attacker.close()
                await run.ask_undisturbed(answers, of_encoder)
                logger.info("undisturbed answers are known")
                yield run
            finally:
                await run.close()
        finally:
            await fleet.close()
