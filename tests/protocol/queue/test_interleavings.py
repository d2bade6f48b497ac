"""Explores the protocol: the real scripts under random orders of steps, deaths, pauses and lost replies.

Two workers (pure publishing core), a scheduler, a gateway (pure delivery core) and a client that cancels act in a
random walk. A token is a function of (position, worker life), so a token written by the wrong owner is detected. In
every other walk the requests are choices of one call, whose body must exist until the last of them has ended.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from redis.exceptions import ResponseError

from gateway.calls.replies import Cursor
from gpu_worker.service.outbox import Outbox
from gpu_worker.service.owned import OwnedRequest, PendingOutput
from lorafleet.launcher.embedded import EmbeddedServer
from protocol.queue.books.quota import Quota
from protocol.queue.bus import Bus, Refused, StepResult, decode, now_ms
from protocol.queue.scripts import FOLDER
from protocol.wire import messages as m

GATEWAY = "g"
LENGTH = 5
MAX_ATTEMPTS = 3
RIDS = ("r0", "r1")
ENDS: dict[str, tuple[str, m.FinishReason]] = {
    "exhausted": ("failed", "error"),
    "cancelled": ("cancelled", "cancelled"),
}
"""Outcome of `requeue` -> how a scheduler ends a dead worker's request."""
T = TypeVar("T")

QUOTA = Quota("t", max_bytes=1 << 30)


class LostReplyError(Exception):
    """The client has lost the reply."""


class Life:
    """One life of a worker process."""

    def __init__(self, wid: str, number: int) -> None:
        self.wid = wid
        self.number = number
        self.outbox = Outbox(wid)
        self.pending: dict[str, PendingOutput] = {}
        self.last = b"0"


class World:
    """A fleet in miniature; each method in `MOVES` is a possible next event."""

    MOVES = (
        "submit",
        "assign",
        "take",
        "step",
        "step",
        "zombie_step",
        "die",
        "notice_death",
        "cancel",
        "deadline",
        "deliver",
        "look",
    )

    may_mend = False  # whether gateways extend logs, also after the end

    def __init__(self, url: str, seed: int, lua: Path = FOLDER) -> None:
        self.random = random.Random(seed)
        self.calls = (RIDS,) if seed % 2 else tuple((rid,) for rid in RIDS)
        self.loop = asyncio.new_event_loop()
        self.bus = Bus(url, lua=lua)
        self.ask = self.bus._line.ask
        self.run(self.bus._redis.flushall())
        self.run(self.bus.streams.create(self.bus.keys.out(GATEWAY), 300))
        self.lives: dict[int, Life] = {}
        self.zombies: list[Life] = []
        self.lost: list[str] = []  # ids of dead workers not noticed yet
        self.count = 0
        self.shown: dict[str, list[int]] = defaultdict(list)
        self.ends: dict[str, list[str]] = defaultdict(list)
        self.cursors: dict[str, Cursor] = {}
        self.out_last = b"0"
        self.submitted: set[str] = set()
        self.final: dict[str, tuple[bytes, list[int]]] = {}
        for slot in (0, 1):
            self.start_worker(slot)

    def run(self, awaitable: Awaitable[T]) -> T:
        return self.loop.run_until_complete(awaitable)

    def close(self) -> None:
        self.run(self.bus.close())
        self.loop.close()

    def walk(self, num_moves: int) -> None:
        """Make random moves, check the invariants after each, then let everything end."""
        for _ in range(num_moves):
            getattr(self, self.random.choice(self.MOVES))()
            self.clients_see_the_log_and_owners_know_it()
            self.calls_have_bodies_and_are_counted()
        self.settle_everything()
        self.calls_have_bodies_and_are_counted()

    def log(self, rid: str) -> bytes:
        """Return the ids in a request's log."""
        return self.run(self.bus._redis.get(self.bus.keys.tok(rid))) or b""

    def _maybe(self) -> bool:
        return self.random.random() < 0.5

    # ------------------------------------------------------------ moves

    def start_worker(self, slot: int) -> None:
        self.count += 1
        life = Life(f"w{self.count}", self.count)
        self.run(self.bus.streams.create(self.bus.keys.work(life.wid), 300))
        self.run(self.bus.streams.create(self.bus.keys.ctl(life.wid), 300))
        self.lives[slot] = life

    def submit(self) -> None:
        rid = self.random.choice(RIDS)
        if rid in self.submitted:
            return
        for one in self.call_with(rid):
            self.submitted.add(one)
            self.cursors[one] = Cursor()
        self.send(rid)

    def call_with(self, rid: str) -> tuple[str, ...]:
        return next(call for call in self.calls if rid in call)

    def send(self, rid: str) -> None:
        body = m.Body(prompt=b"\0\0\0\0", sampling=m.Sampling(), max_new_tokens=LENGTH)
        pairs = [
            (
                m.RequestHead(
                    rid=one, tenant="t", cls="interactive", digest="", num_prompt_tokens=1, max_new_tokens=LENGTH,
                    deadline_ms=now_ms() + 60_000, gateway=GATEWAY,
                ),
                body,
            )
            for one in self.call_with(rid)
        ]  # fmt: skip
        self.run(self.bus.submit("interactive", pairs, max_queued=10, quota=QUOTA))

    def assign(self) -> None:
        """The scheduler assigns entries of the submit stream, twice if its view is stale."""
        slot, num = self.random.randrange(2), self.random.randint(1, 3)
        entries = self.run(self.bus.streams.entries(self.bus.keys.sub("interactive")))[:num]
        batch = [(decode(fields[b"b"], m.RequestHead), int(fields[b"e"])) for _, fields in entries]
        assigned = [(m.Assigned(sub.rid, epoch + 1, "", "t", GATEWAY), epoch) for sub, epoch in batch]
        if not assigned:
            return
        status, _ = self.run(self.bus.assign(self.lives[slot].wid, assigned))
        if status == "ok" and self._maybe():
            status, _ = self.run(self.bus.assign(self.lives[1 - slot].wid, assigned))
            assert status == "stale"
        if self._maybe():
            self.take_by(slot)

    def take(self) -> None:
        self.take_by(self.random.randrange(2))

    def take_by(self, slot: int) -> None:
        """A worker reads its stream."""
        life = self.lives[slot]
        start = b"(" + life.last if life.last != b"0" else "-"
        found = self.run(self.bus._redis.xrange(self.bus.keys.work(life.wid), min=start))
        for entry, fields in found:
            life.last = entry
            items = decode(fields[b"b"], list[m.Assigned])
            held = [
                OwnedRequest(item.rid, item.epoch, entry, GATEWAY, "t", 1, 0, bytearray(self.log(item.rid)))
                for item in items
            ]
            life.outbox.take(entry, held)

    def step(self) -> None:
        self.engine_step(self.random.choice(list(self.lives.values())), self._maybe())

    def zombie_step(self) -> None:
        """A worker that was declared dead resumes and writes."""
        for life in self.zombies:
            self.engine_step(life, self._maybe())

    def engine_step(self, life: Life, lose_reply: bool) -> None:
        for rid, held in life.outbox.owned.items():
            if rid in life.pending:
                continue
            position = held.num_logged
            if position >= LENGTH:
                continue
            token = position * 1000 + life.number
            finish = "length" if position + 1 == LENGTH else ""
            life.pending[rid] = PendingOutput(ids=token.to_bytes(4, "little"), finish=finish)
        while True:
            step = life.outbox.build(life.pending)
            if not step.rows and not step.done_entries:
                break
            refused = self.write_step(life.wid, step, lose_reply)
            if refused is None:
                return  # pending stays: the same step is written again later
            if not refused:
                life.outbox.commit(step, life.pending)
                break
            recovery = life.outbox.recover(life.pending, refused)
            assert not recovery.repairs, "no log lost its end here"
        life.pending.clear()

    def write_step(self, wid: str, step: StepResult, lose_reply: bool) -> list[Refused] | None:
        """Call the step script once, or twice like a client that lost its connection. None: the reply is lost."""
        is_repeated = self.random.random() < 0.2

        async def ask(command: Any, within_s: float | None = None) -> Any:
            if is_repeated:
                await self.ask(command, within_s)
            reply = await self.ask(command, within_s)
            if lose_reply:
                raise LostReplyError
            return reply

        self.bus._line.ask = ask
        try:
            return self.run(self.bus.step(wid, step))
        except LostReplyError:
            return None
        finally:
            self.bus._line.ask = self.ask

    def die(self) -> None:
        """A worker is killed, or only suspended; its successor has a new id."""
        slot = self.random.randrange(2)
        life = self.lives[slot]
        self.lost.append(life.wid)
        if self._maybe():
            self.zombies.append(life)
        self.start_worker(slot)
        if self._maybe():
            self.notice_death()

    def notice_death(self) -> None:
        if self.lost:
            self.bury(self.lost.pop(0))

    def bury(self, wid: str) -> None:
        """The scheduler's work for a dead worker; any prefix of it may happen twice."""
        entries = self.run(self.bus.streams.entries(self.bus.keys.work(wid)))
        rids = [item.rid for _, fields in entries for item in decode(fields[b"b"], list[m.Assigned])]
        for _ in range(2):
            outcomes = self.run(self.bus.requeue(wid, rids, counts=True, max_attempts=MAX_ATTEMPTS)) if rids else {}
            for rid, outcome in outcomes.items():
                if outcome in ENDS:
                    for _ in range(2):
                        self.run(self.bus.finish(rid, *ENDS[outcome]))
        self.run(self.bus.members.leave(wid))

    def cancel(self) -> None:
        if self.random.random() < 0.3:  # rarely, or no request would live long enough to go wrong
            self.run(self.bus.cancel(self.random.choice(RIDS)))

    def deadline(self) -> None:
        """The scheduler ends a request at its deadline, perhaps too late."""
        if self.random.random() < 0.2:
            self.run(self.bus.finish(self.random.choice(RIDS), "failed", "error"))

    def deliver(self) -> None:
        """The gateway reads new deltas, as `gateway.calls.replies` does."""
        start = b"(" + self.out_last if self.out_last != b"0" else "-"
        for entry, fields in self.run(self.bus._redis.xrange(self.bus.keys.out(GATEWAY), min=start)):
            self.out_last = entry
            for delta in decode(fields[b"b"], list[m.Delta]):
                self.show(delta)

    def show(self, delta: m.Delta) -> None:
        cursor = self.cursors[delta.rid]
        if cursor.needs_log(delta):
            filled = self.run(self.bus.read_log(delta.rid, cursor.next))
            assert filled is not None
            delta = filled
        if cursor.is_stale(delta):
            return
        ids, _ = cursor.take(delta, 0)
        self.shown[delta.rid] += _ids(ids)
        if delta.finish:
            self.ends[delta.rid].append(delta.finish)

    def look(self) -> None:
        """A client reads a log: it must get exactly what has been written."""
        rid = self.random.choice(RIDS)
        found = self.run(self.bus.read_log(rid, 0))
        assert found is None or found.ids == self.log(rid), "not all that was written can be read"

    # ------------------------------------------------------------ invariants

    def clients_see_the_log_and_owners_know_it(self) -> None:
        rids = sorted(self.submitted)
        pipe = self.bus._redis.pipeline(transaction=False)
        for rid in rids:
            pipe.get(self.bus.keys.tok(rid))
            pipe.hmget(self.bus.keys.req(rid), ("epoch", "owner", "state"))
        replies = self.run(pipe.execute())
        for rid, raw, (epoch, owner, state) in zip(rids, replies[::2], replies[1::2], strict=True):
            log = _ids(raw or b"")
            assert [token // 1000 for token in log] == list(range(len(log))), "a position is missing or doubled"
            assert self.shown[rid] == log[: len(self.shown[rid])], "a client saw what the log does not hold"
            assert len(self.ends[rid]) <= 1
            if state.decode() in m.TERMINAL:
                ended_as, last_log = self.final.setdefault(rid, (state, log))
                assert ended_as == state, "a request ended twice"
                assert last_log == log or self.may_mend, "tokens were written after the end"
            for life in self.lives.values():
                held = life.outbox.owned.get(rid)
                if held is not None and owner == life.wid.encode() and held.epoch == int(epoch):
                    known = _ids(bytes(held.log))
                    assert log[: len(known)] == known, "the owner goes on from tokens that are not the log's"
                    for token in log[len(known) :]:
                        assert token % 1000 == life.number, "somebody else wrote into the owner's log"

    def calls_have_bodies_and_are_counted(self) -> None:
        keys, pipe = self.bus.keys, self.bus._redis.pipeline(transaction=False)
        pipe.zrange(keys.kept("t"), 0, -1, withscores=True)
        for call in self.calls:
            for rid in call:
                pipe.hget(keys.req(rid), "state")
            pipe.hget(keys.call(call[0]), "open")
            pipe.exists(keys.body(call[0]))
        replies = iter(self.run(pipe.execute()))
        counted = dict(next(replies))
        total = -int(counted.pop(b"sum", 0))
        assert total == sum(int(entry.rpartition(b":")[2]) for entry in counted), "a tenant's bytes drift"
        for call in self.calls:
            states = [next(replies) for _ in call]
            open_now, bodies = next(replies), next(replies)
            if None in states:
                assert not any(states), "a call is there in part"
                continue
            num_open = sum(state.decode() not in m.TERMINAL for state in states)
            assert int(open_now or 0) == num_open, "a call does not know how many of its requests run"
            assert bodies == (num_open > 0), "bodies are not there exactly while they are needed"
            assert sum(entry.startswith(call[0].encode() + b":") for entry in counted) == 1, "a call is counted once"

    def settle_everything(self) -> None:
        """Let all events finish: then every request has one end, and the client has all of it."""
        for _ in range(12):
            while self.lost:
                self.bury(self.lost.pop(0))
            for slot in (0, 1):
                self.assign()
                self.take_by(slot)
                for _ in range(LENGTH + 1):
                    self.engine_step(self.lives[slot], lose_reply=False)
            self.deliver()
        self.clients_see_the_log_and_owners_know_it()
        for rid in self.submitted:
            facts = self.run(self.bus.requests([rid]))[0]
            assert facts is not None
            assert facts.is_terminal, f"{rid} never ended: {facts}"
            assert len(self.ends[rid]) == 1, f"{rid} ended for its client {len(self.ends[rid])} times"
            if facts.state == "completed":
                assert len(self.shown[rid]) == LENGTH
        for life in self.lives.values():
            assert self.run(self.bus._redis.xlen(self.bus.keys.work(life.wid))) == 0, "work was left behind"
        assert self.run(self.bus._redis.xlen(self.bus.keys.sub("interactive"))) == 0


def explore(url: str, num_walks: int, lua: Path = FOLDER) -> None:
    """Take walks with the seeds 0, 1, …; a failure names its seed. lua: folder of the scripts."""
    for seed in range(num_walks):
        world = World(url, seed, lua)
        try:
            world.walk(40)
        except (AssertionError, ResponseError) as error:
            raise AssertionError(f"walk {seed}: {error}") from error
        finally:
            world.close()


def _ids(raw: bytes) -> list[int]:
    return [int.from_bytes(raw[i : i + 4], "little") for i in range(0, len(raw), 4)]


def test_no_interleaving_loses_or_doubles_a_token(queue_server: EmbeddedServer) -> None:
    explore(queue_server.url, num_walks=300)


@pytest.mark.parametrize(
    ("script", "good", "planted"),
    [
        ("step", "elseif f[1] ~= epoch then", "elseif false then"),
        ("step", "elseif len ~= seq0 then", "elseif false then"),
        ("step", "if epochs[i] ~= rows[a + 1] then return false end", ""),
        ("step", "if len ~= rows[a + 2] * 4 + size then", "if false then"),
        ("step", "if rows[b + 3] > 0 then cut(tok .. rows[b], rows[b + 3]) end", ""),
        ("finish", "disown(f[2], rid)", ""),
        ("assign", "f[1] ~= 'queued' or f[2] ~= epoch", "false"),
        ("finish", "if not f[1] or is_terminal(f[1]) then", "if not f[1] then"),
        ("common", "redis.call('UNLINK', key, body_key(call))", "redis.call('UNLINK', key)"),
        ("common", "if f[1] ~= '1' then", "if false then"),
        ("common", "give_back(f[2], call, f[3])", ""),
    ],
)
def test_the_exploration_finds_planted_bugs(
    queue_server: EmbeddedServer, tmp_path: Path, script: str, good: str, planted: str
) -> None:
    for file in FOLDER.iterdir():
        source = file.read_text()
        if file.stem == script:
            assert source.count(good) == 1
            source = source.replace(good, planted)
        (tmp_path / file.name).write_text(source)
    with pytest.raises(AssertionError, match="walk"):
        explore(queue_server.url, num_walks=400, lua=tmp_path)
