"""The order of the backlog: who is next, who may pass whom, and that every request is served."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from helpers import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from protocol.wire.keys import BATCH, CLASSES
from scheduler.backlog import Backlog, FairQueue, OfferResult
from scheduler.fairness import VirtualTokenCounters
from scheduler.request import QueuedRequest
from tests.scheduler.fakes import make_submit

SLACK = 100.0
DIGESTS = ("", "a", "b", "c")
TENANTS = ("t0", "t1", "t2")


def request(order: int, tenant: str = "t", digest: str = "", *, tokens: int = 10, **more: Any) -> QueuedRequest:
    sub = make_submit(f"r{order}", tenant=tenant, digest=digest, num_prompt_tokens=tokens, **more)
    return QueuedRequest(sub, epoch=0, order=order)


def nobody(tenant: str) -> bool:
    """Return False: no tenant yields."""
    return False


class Server:
    """Takes offered requests like a fleet: charges the tenant and removes them from the backlog."""

    def __init__(self, counters: VirtualTokenCounters, backlog: Backlog) -> None:
        self.counters = counters
        self.backlog = backlog
        self.room = 0
        self.taken: list[QueuedRequest] = []
        self.held: set[str] = set()  # digests whose requests are held back
        self.blocked: set[str] = set()

    def offer(self, request: QueuedRequest, final: bool) -> OfferResult:
        assert not request.dropped
        if self.room == 0:
            return OfferResult.FULL
        if request.submit.digest in self.blocked:
            return OfferResult.BLOCKED
        if request.submit.digest in self.held and not final:
            return OfferResult.HELD
        self.room -= 1
        self.backlog.remove(request)
        self.counters.charge(request.submit.tenant, request.submit.num_prompt_tokens, 0, request.submit.weight)
        self.taken.append(request)
        return OfferResult.PLACED

    def serve(self, num: int, cls: str = "interactive", *, warm: bool = True) -> list[QueuedRequest]:
        start, self.room = len(self.taken), num
        self.backlog.of("").fair[cls, warm].scan(self.offer, slack=SLACK, max_refused=64, yields=nobody)
        return self.taken[start:]


def make_server(*requests: QueuedRequest) -> Server:
    counters = VirtualTokenCounters(4 * SLACK)
    backlog = Backlog(counters)
    server = Server(counters, backlog)
    for digest in DIGESTS:
        backlog.set_warm(digest, True)
    for item in requests:
        backlog.push(item)
    return server


class BacklogMachine(RuleBasedStateMachine):
    """Random pushes, removals, moves between lanes and scans, compared with a plain dict of queued requests."""

    def __init__(self) -> None:
        super().__init__()
        self.server = make_server()
        self.queued: dict[str, QueuedRequest] = {}
        self.warm = set(DIGESTS)
        self.count = 0

    @rule(
        tenant=st.sampled_from(TENANTS), digest=st.sampled_from(DIGESTS), tokens=st.integers(1, 50),
        cls=st.sampled_from(CLASSES), deadline=st.integers(1, 5),
    )  # fmt: skip
    def push(self, tenant: str, digest: str, tokens: int, cls: str, deadline: int) -> None:
        self.count += 1
        item = request(self.count, tenant, digest, tokens=tokens, cls=cls, deadline_ms=deadline)
        self.queued[item.rid] = item
        self.server.backlog.push(item)

    @precondition(lambda self: self.queued)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        rid = data.draw(st.sampled_from(sorted(self.queued)))
        self.server.backlog.remove(self.queued.pop(rid))

    @rule(digest=st.sampled_from(DIGESTS[1:]))
    def move(self, digest: str) -> None:
        self.warm ^= {digest}
        self.server.backlog.set_warm(digest, digest in self.warm)

    @rule(
        num=st.integers(0, 5), cls=st.sampled_from(CLASSES), warm=st.booleans(),
        held=st.sets(st.sampled_from(DIGESTS)), blocked=st.sets(st.sampled_from(DIGESTS)),
    )  # fmt: skip
    def scan(self, num: int, cls: str, warm: bool, held: set[str], blocked: set[str]) -> None:
        self.server.held, self.server.blocked = held, blocked
        free = [r for r in self._in_lane(cls, warm) if r.submit.digest not in held | blocked]
        for item in self.server.serve(num, cls, warm=warm):
            assert self.queued.pop(item.rid) is item
            same = [r for r in self._in_lane(cls, warm) if r.submit.tenant == item.submit.tenant]
            first = [r for r in same if r.submit.digest == item.submit.digest]
            assert all(item.sort_key <= other.sort_key for other in first), "not by deadline"
        if num and free:
            assert self.server.room < num, "nothing was served although something could be"

    @rule(num=st.integers(1, 5), cls=st.sampled_from(CLASSES), digests=st.sets(st.sampled_from(DIGESTS[1:])))
    def scan_adapters(self, num: int, cls: str, digests: set[str]) -> None:
        self.server.held = self.server.blocked = set()
        possible = [r for r in self._in_lane(cls, True) if r.submit.digest in digests]
        start, self.server.room = len(self.server.taken), num
        placed = (
            self.server.backlog.of("").fair[cls, True].scan_adapters(digests, self.server.offer, float("inf"), nobody)
        )
        taken = self.server.taken[start:]
        assert placed == len(taken) == min(num, len(possible))
        for item in taken:
            assert item.submit.digest in digests
            del self.queued[item.rid]

    def _in_lane(self, cls: str, warm: bool) -> list[QueuedRequest]:
        return [r for r in self.queued.values() if r.submit.cls == cls and (r.submit.digest in self.warm) == warm]

    @invariant()
    def counts_are_right(self) -> None:
        backlog = self.server.backlog
        assert backlog.num_queued == len(self.queued)
        assert backlog.by_digest == Counter(r.submit.digest for r in self.queued.values())
        assert {tenant: of.num for tenant, of in backlog.by_tenant.items()} == Counter(
            r.submit.tenant for r in self.queued.values()
        )
        assert sum(of.num_tokens for of in backlog.by_tenant.values()) == backlog.num_tokens
        assert sum(of.num_batch for of in backlog.by_tenant.values()) == backlog.by_class[BATCH]
        for cls in CLASSES:
            for warm in (True, False):
                assert bool(backlog.of("").fair[cls, warm]) == bool(self._in_lane(cls, warm))

    def teardown(self) -> None:
        self.server.held = self.server.blocked = set()
        for cls in CLASSES:
            for warm in (True, False):
                for item in self.server.serve(10_000, cls, warm=warm):
                    del self.queued[item.rid]
        assert not self.queued, "requests were lost"


TestBacklogMachine = BacklogMachine.TestCase
TestBacklogMachine.settings = settings(max_examples=examples.of(150), stateful_step_count=40, deadline=None)


@given(st.lists(st.tuples(st.sampled_from(TENANTS), st.integers(1, 60)), min_size=1, max_size=120), st.integers(1, 4))
def test_backlogged_tenants_stay_within_two_requests_of_each_other(items: list[tuple[str, int]], step: int) -> None:
    server = make_server(*(request(i, tenant, tokens=tokens) for i, (tenant, tokens) in enumerate(items)))
    served: dict[str, int] = defaultdict(int)
    left = Counter(tenant for tenant, _ in items)
    while batch := server.serve(step):
        for item in batch:
            backlogged = [tenant for tenant in TENANTS if left[tenant]]
            spread = max(served[t] for t in backlogged) - min(served[t] for t in backlogged)
            assert spread <= 2 * 60
            served[item.submit.tenant] += item.submit.num_prompt_tokens
            left[item.submit.tenant] -= 1
    assert not left.total()


def test_a_heavier_tenant_gets_its_share() -> None:
    items = [request(i, tenant, weight=w) for i in range(100) for tenant, w in (("t0", 1.0), ("t1", 3.0))]
    server = make_server(*items)
    shares = Counter(item.submit.tenant for item in server.serve(40))
    assert shares == {"t1": 30, "t0": 10}


def test_a_tenant_that_was_idle_is_lifted_to_the_others() -> None:
    server = make_server(*(request(i, "busy") for i in range(100)))
    server.serve(50)
    for i in range(100, 150):
        server.backlog.push(request(i, "back"))
    shares = Counter(item.submit.tenant for item in server.serve(20))
    assert abs(shares["busy"] - shares["back"]) <= 1


def test_a_blocked_tenant_catches_up_by_no_more_than_the_largest_lag() -> None:
    server = make_server(*(request(i, "stuck", "a") for i in range(100)))
    server.blocked = {"a"}
    for i in range(100, 400):
        server.backlog.push(request(i, "busy"))
    assert {item.submit.tenant for item in server.serve(200)} == {"busy"}
    server.blocked = set()
    shares = Counter(item.submit.tenant for item in server.serve(100))
    most = (4 * SLACK / 10 + 100) / 2
    assert 50 <= shares["stuck"] <= most + 1


def test_all_tokens_of_what_is_queued_are_counted() -> None:
    """A queued request counts its prompt, its adapter's virtual tokens and its maximum output."""
    item = request(0, tokens=10, num_virtual=30)
    server = make_server(item, request(1, tokens=10))
    assert server.backlog.num_tokens == 10 + 30 + 4 + 10 + 4
    server.backlog.remove(item)
    assert server.backlog.num_tokens == 10 + 4


def test_a_held_request_is_passed_within_the_slack_and_then_served() -> None:
    server = make_server(request(0, "held", "a"), *(request(i, "other") for i in range(1, 50)))
    server.held = {"a"}
    served = server.serve(40)
    position = [item.submit.tenant for item in served].index("held")
    assert 10 * (position - 1) <= SLACK < 10 * (position + 1)


def test_what_cannot_run_keeps_nothing_else_from_running() -> None:
    """Even if it is first in its tenant's queue, and many tenants have such requests."""
    stuck = [request(i, f"s{i}", "a") for i in range(30)] + [request(100 + i, "t", "a") for i in range(30)]
    server = make_server(*stuck, request(200, "t", "b"), *(request(300 + i, "last") for i in range(5)))
    server.blocked = {"a"}
    assert {item.submit.rid for item in server.serve(100)} == {"r200", "r300", "r301", "r302", "r303", "r304"}


def test_requests_behind_an_early_end_of_a_scan_are_found_by_adapter() -> None:
    stuck = [request(i, f"s{i}", "a") for i in range(100)]
    server = make_server(*stuck, request(200, "last", "b", tokens=1))
    server.counters.charge("last", 50, 0, 1.0)
    server.blocked = {"a"}
    server.room = 1
    queue = server.backlog.of("").fair["interactive", True]
    limit = queue.scan(server.offer, slack=SLACK, max_refused=64, yields=nobody)
    assert limit is not None
    assert not server.taken
    assert queue.scan_adapters({"b", "c"}, server.offer, limit, nobody) == 1
    assert server.taken[0].rid == "r200"


def test_scanning_many_queues_of_one_tenant_does_not_lose_the_order() -> None:
    digests = [f"d{i}" for i in range(30)]
    counters = VirtualTokenCounters(0.0)
    queue = FairQueue(counters)
    items = [request(i, "t", digest, deadline_ms=100 - i) for i, digest in enumerate(digests)]
    for item in items:
        queue.push(item)
    offered: list[QueuedRequest] = []

    def refuse(item: QueuedRequest, final: bool) -> OfferResult:
        offered.append(item)
        return OfferResult.BLOCKED

    for _ in range(3):
        queue.scan(refuse, slack=0.0, max_refused=64, yields=nobody)
    assert [item.rid for item in offered] == 3 * [f"r{29 - i}" for i in range(8)]


def test_counters_of_tenants_that_left_are_forgotten() -> None:
    server = make_server()
    for i in range(5000):
        server.backlog.push(request(i, f"t{i}"))
        assert len(server.serve(1)) == 1
    assert len(server.counters) < 1100
    assert server.counters["t1"] == server.counters.level > 0
