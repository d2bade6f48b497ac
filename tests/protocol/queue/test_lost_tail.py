"""Explores the protocol further: the queue is killed and comes back without its last writes.

Like `test_interleavings`, with an engine that continues on its own, and a queue that is reset to an earlier state. A
token is a function of its request and position, as with a real engine; its place in the log shows whether one was lost,
doubled, or misplaced.
"""

from __future__ import annotations

import pytest

from gpu_worker.planning.request import TokenOutput
from gpu_worker.service.outbox import add_outputs
from gpu_worker.service.owned import OwnedRequest, PendingOutput
from lorafleet.launcher.embedded import EmbeddedServer
from protocol.queue.bus import decode
from protocol.wire import messages as m
from scheduler.config import SchedulerConfig
from scheduler.core import Scheduler
from scheduler.recovery import Recovery
from tests.protocol.queue.test_interleavings import GATEWAY, LENGTH, RIDS, Life, World, _ids

MANY = 1000  # attempts; a queue that forgets must not turn requests into dead letters


LENGTHS = {rid: LENGTH + 2 * number for number, rid in enumerate(RIDS)}
"""Number of tokens of each request: requests that are assigned together do not end together."""


def token(rid: str, position: int) -> int:
    return 1000 * RIDS.index(rid) + position


class LosingWorld(World):
    """A `World` with a queue that forgets; each participant notices that at some later time."""

    MOVES = (
        "submit",
        "assign",
        "take",
        "step",
        "step",
        "step",
        "die",
        "notice_death",
        "cancel",
        "deliver",
        "deliver",
        "look",
        "save",
        "save",
        "lose_tail",
        "worker_notices",
        "gateway_notices",
    )

    may_mend = True

    def __init__(self, url: str, seed: int) -> None:
        self.engines: dict[str, dict[str, int]] = {}  # wid -> request -> next position
        self.in_flight: dict[str, dict[str, PendingOutput]] = {}  # wid -> outputs that it is writing
        self.unaware: set[str] = set()  # wids that have not noticed the restart
        self.gateway_unaware = False
        self.buried: list[str] = []
        self.saved: dict[bytes, tuple[bytes, int]] = {}
        super().__init__(url, seed)

    # ------------------------------------------------------------ the queue

    def save(self) -> None:
        """Save the current state, which will survive."""
        keys: list[bytes] = self.run(self.bus._redis.keys("*"))
        pipe = self.bus._redis.pipeline(transaction=False)
        for key in keys:
            pipe.dump(key)
            pipe.pttl(key)
        replies = self.run(pipe.execute())
        self.saved = {
            key: (raw, max(0, ttl_ms)) for key, raw, ttl_ms in zip(keys, replies[::2], replies[1::2], strict=True)
        }

    def lose_tail(self) -> None:
        if not self.saved:
            return
        pipe = self.bus._redis.pipeline(transaction=False)
        pipe.flushall()
        pipe.script_flush()  # like any new server process
        for key, (raw, ttl_ms) in self.saved.items():
            pipe.restore(key, ttl_ms, raw, replace=True)
        self.run(pipe.execute())
        restored_ms = self.queue_ms()
        while self.queue_ms() == restored_ms:  # a server never starts within the millisecond of its last entry's id
            pass
        self.unaware = {life.wid for life in self.lives.values()}
        self.gateway_unaware = True
        self.final.clear()
        back = [wid for wid in self.buried if self.bus.keys.work(wid).encode() in self.saved]
        self.lost += [wid for wid in back if wid not in self.lost]

    def queue_ms(self) -> int:
        seconds, micros = self.run(self.bus._redis.time())
        return seconds * 1000 + micros // 1000

    # ------------------------------------------------------------ workers

    def start_worker(self, slot: int) -> None:
        super().start_worker(slot)
        self.engines[self.lives[slot].wid] = {}
        self.in_flight[self.lives[slot].wid] = {}

    def worker_notices(self) -> None:
        slot = self.random.randrange(2)
        life = self.lives[slot]
        if life.wid not in self.unaware:
            return
        self.unaware.discard(life.wid)
        if not self.run(self.bus._redis.exists(self.bus.keys.work(life.wid))):
            self.start_worker(slot)  # its streams are gone: it joins again
            return
        life.last = b"0"
        self.take_by(slot)

    def take_by(self, slot: int) -> None:
        life = self.lives[slot]
        start = b"(" + life.last if life.last != b"0" else "-"
        for entry, fields in self.run(self.bus._redis.xrange(self.bus.keys.work(life.wid), min=start)):
            life.last = entry
            items = decode(fields[b"b"], list[m.Assigned])
            if life.outbox.knows(entry):
                items = self.lost_ends(life, items)
            held = [self._held(item, entry) for item in items]
            if not held:
                continue
            self.stop_engine(life.wid, life.outbox.take(entry, held))
            for request in held:
                life.pending.pop(request.rid, None)
                # The engine ignores requests that it already has: see `Engine._start`.
                self.engines[life.wid].setdefault(request.rid, request.num_logged)

    def lost_ends(self, life: Life, items: list[m.Assigned]) -> list[m.Assigned]:
        """Equivalent of `gpu_worker.service`."""
        ended = [item for item in items if item.rid not in life.outbox.owned]
        found = self.run(self.bus.owned([item.rid for item in ended]))
        return [
            item
            for item, request in zip(ended, found, strict=True)
            if request and (request.state, request.owner, request.epoch) == ("assigned", life.wid, item.epoch)
        ]

    def stop_engine(self, wid: str, rids: list[str]) -> None:
        for rid in rids:
            del self.engines[wid][rid]

    def _held(self, item: m.Assigned, entry: bytes) -> OwnedRequest:
        return OwnedRequest(item.rid, item.epoch, entry, GATEWAY, "t", 1, 0, bytearray(self.log(item.rid)))

    def engine_step(self, life: Life, lose_reply: bool) -> None:
        engine = self.engines[life.wid]
        outputs = []
        for rid, position in list(engine.items()):
            ids = [token(rid, position)] if position < LENGTHS[rid] else []
            finish = "length" if position + 1 >= LENGTHS[rid] else ""
            outputs.append(TokenOutput(rid, 0, position, ids, finish=finish))
            engine[rid] += 1
            if finish:
                del engine[rid]
        add_outputs(life.pending, outputs)
        self.place(life.pending)
        if not self.in_flight[life.wid]:
            self.in_flight[life.wid], life.pending = life.pending, {}
        self.write(life, lose_reply)

    def place(self, pending: dict[str, PendingOutput]) -> None:
        """Set where new tokens belong; `add_outputs` has done that already."""

    def write(self, life: Life, lose_reply: bool) -> None:
        """Write what is in flight; after a lost reply it stays in flight, whatever is assigned in the meantime."""
        pending = self.in_flight[life.wid]
        while True:
            step = life.outbox.build(pending)
            if not step.rows and not step.done_entries:
                break
            refused = self.write_step(life.wid, step, lose_reply)
            if refused is None:
                return
            if not refused:
                life.outbox.commit(step, pending)
                break
            recovery = life.outbox.recover(pending, refused)
            for held in recovery.repairs:
                self.run(self.bus.repair(held.rid, 0, bytes(held.log), b"", 0))
            for rid in recovery.dropped:
                self.engines[life.wid].pop(rid, None)
            self.requeue(life.wid, recovery.returned)
        pending.clear()

    def requeue(self, wid: str, rids: list[str]) -> None:
        outcomes = self.run(self.bus.requeue(wid, rids, counts=False, max_attempts=MANY)) if rids else {}
        for rid, outcome in outcomes.items():
            if outcome == "cancelled":
                self.run(self.bus.finish(rid, "cancelled", "cancelled"))

    def bury(self, wid: str) -> None:
        super().bury(wid)
        self.buried.append(wid)

    def find_orphans(self) -> None:
        """A scheduler's new session looks for requests that no worker has."""
        self.run(Recovery(self.bus, Scheduler(SchedulerConfig()), MANY).find_orphans())

    # ------------------------------------------------------------ the gateway

    def gateway_notices(self) -> None:
        if self.gateway_unaware:
            self.gateway_unaware = False
            for rid in self.submitted:
                if not self.ends[rid]:
                    self.mend(rid)
                    self.catch_up(rid)

    def mend(self, rid: str) -> None:
        """Equivalent of `gateway.calls.follow` for its open requests."""
        self.send(rid)
        self.cursors[rid].epoch = 0
        self.repair(rid)

    def repair(self, rid: str) -> None:
        ids = b"".join(id_.to_bytes(4, "little") for id_ in self.shown[rid])
        self.run(self.bus.repair(rid, 0, ids, b"", 0))

    def catch_up(self, rid: str) -> None:
        filled = self.run(self.bus.read_log(rid, self.cursors[rid].next))
        if filled is None:
            self.mend(rid)
            filled = self.run(self.bus.read_log(rid, self.cursors[rid].next))
        assert filled is not None, f"the queue does not know {rid} any more"
        self.give(rid, filled)

    def show(self, delta: m.Delta) -> None:
        if self.ends[delta.rid]:
            return  # no client reads any more
        cursor = self.cursors[delta.rid]
        if cursor.needs_log(delta):
            self.catch_up(delta.rid)
            if cursor.needs_log(delta):
                return
        self.give(delta.rid, delta)

    def give(self, rid: str, delta: m.Delta) -> None:
        if self.cursors[rid].is_stale(delta):
            return
        ids, _ = self.cursors[rid].take(delta, 0)
        self.shown[rid] += _ids(ids)
        if delta.finish:
            self.ends[rid].append(delta.finish)

    # ------------------------------------------------------------ invariants

    def clients_see_the_log_and_owners_know_it(self) -> None:
        rids = sorted(self.submitted)
        logs = self.run(self.bus._redis.mget([self.bus.keys.tok(rid) for rid in rids])) if rids else []
        for rid, raw in zip(rids, logs, strict=True):
            log = _ids(raw or b"")
            expected = [token(rid, position) for position in range(LENGTHS[rid])]
            assert log == expected[: len(log)], f"the log of {rid} is wrong: {log}"
            assert self.shown[rid] == expected[: len(self.shown[rid])], f"a client saw {self.shown[rid]} of {rid}"
            assert len(self.ends[rid]) <= 1
            if not self.gateway_unaware and not self.ends[rid]:
                assert len(log) >= len(self.shown[rid]), "the log is shorter than what was shown"

    def settle_everything(self) -> None:
        self.gateway_notices()
        for _ in range(12):
            while self.unaware & {life.wid for life in self.lives.values()}:
                self.worker_notices()
            while self.lost:
                self.bury(self.lost.pop(0))
            self.find_orphans()
            for slot in (0, 1):
                self.assign()
                self.take_by(slot)
                for _ in range(max(LENGTHS.values()) + 2):
                    self.engine_step(self.lives[slot], lose_reply=False)
            self.deliver()
        self.clients_see_the_log_and_owners_know_it()
        for rid in self.submitted:
            (facts,) = self.run(self.bus.requests([rid]))
            assert facts is None or facts.is_terminal, f"{rid} never ended: {facts}"
            assert len(self.ends[rid]) == 1, f"{rid} ended for its client {len(self.ends[rid])} times"
            if self.ends[rid] == ["length"]:
                assert len(self.shown[rid]) == LENGTHS[rid]
        for life in self.lives.values():
            assert self.run(self.bus._redis.xlen(self.bus.keys.work(life.wid))) == 0, "work was left behind"
        assert self.run(self.bus._redis.xlen(self.bus.keys.sub("interactive"))) == 0


class NeverLooksAgain(LosingWorld):
    """Workers that do not read their stream again after a restart of the queue."""

    def worker_notices(self) -> None:
        for slot, life in self.lives.items():
            self.unaware.discard(life.wid)
            if not self.run(self.bus._redis.exists(self.bus.keys.work(life.wid))):
                self.start_worker(slot)


class NeverFindsOrphans(LosingWorld):
    """A scheduler that trusts every registered worker."""

    MOVES = (
        "submit",
        "submit",
        "assign",
        "take",
        "step",
        "step",
        "step",
        "save",
        "lose_tail",
        "deliver",
    )  # otherwise this is rare

    def find_orphans(self) -> None:
        pass


class NeverRepairs(LosingWorld):
    """A gateway that does not append what its client has seen."""

    def repair(self, rid: str) -> None:
        pass


class NeverSubmitsAgain(LosingWorld):
    """A gateway that submits a request only once."""

    def __init__(self, url: str, seed: int) -> None:
        self.sent: set[str] = set()
        super().__init__(url, seed)

    def send(self, rid: str) -> None:
        if rid not in self.sent:
            self.sent.add(rid)
            super().send(rid)


class KeepsTheEngineGoing(LosingWorld):
    """Workers whose engine continues requests that were assigned again."""

    MOVES = (*LosingWorld.MOVES, "assign", "take", "lose_tail", "worker_notices", "worker_notices")  # else it is rare

    def stop_engine(self, wid: str, rids: list[str]) -> None:
        pass


class WritesWhereverTheLogEnds(LosingWorld):
    """Workers that do not send the positions of their tokens in the log."""

    MOVES = (*LosingWorld.MOVES, "lose_tail", "gateway_notices", "gateway_notices")  # otherwise this is rare

    def place(self, pending: dict[str, PendingOutput]) -> None:
        for new in pending.values():
            new.seq0 = -1


def explore(url: str, num_walks: int, world_type: type[LosingWorld] = LosingWorld) -> None:
    """Take walks with the seeds 0, 1, …; a failure names its seed."""
    for seed in range(num_walks):
        world = world_type(url, seed)
        try:
            world.walk(60)
        except AssertionError as error:
            raise AssertionError(f"walk {seed}: {error}") from error
        finally:
            world.close()


def test_no_moment_at_which_the_queue_forgets_costs_a_token(queue_server: EmbeddedServer) -> None:
    explore(queue_server.url, num_walks=150)


@pytest.mark.parametrize(
    "planted",
    [
        NeverLooksAgain,
        NeverFindsOrphans,
        NeverRepairs,
        NeverSubmitsAgain,
        KeepsTheEngineGoing,
        WritesWhereverTheLogEnds,
    ],
)
def test_the_exploration_finds_planted_bugs(queue_server: EmbeddedServer, planted: type[LosingWorld]) -> None:
    with pytest.raises(AssertionError, match="walk"):
        explore(queue_server.url, num_walks=500, world_type=planted)
