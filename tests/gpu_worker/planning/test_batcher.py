"""The batcher against a simulated cache: in every plan, each token finds the keys and values of those before it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import pytest
from helpers import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gpu_worker.planning.batcher import MAX_SKIPS, Batcher, BatchLimits
from gpu_worker.planning.blocks import BlockPool
from gpu_worker.planning.sequence import Sequence
from gpu_worker.planning.speculation import Drafter
from gpu_worker.planning.step_plan import StepPlan
from gpu_worker.sampling.logprobs import PromptLogprobs
from protocol.runtime.settings import BLOCK_TOKENS
from protocol.wire.messages import StepModel
from tests.gpu_worker.planning.batches import FakeDrafts, FakeSlots, finish_step, make_batcher, make_seq


class Cache:
    """For each slot of the paged cache: a hash of the adapter and of all tokens up to the slot."""

    def __init__(self) -> None:
        self.slots: dict[tuple[int, int], bytes] = {}

    def run(self, plan: StepPlan) -> None:
        """Compute a plan's tokens, after checking that all tokens before them are cached."""
        for seq, num_new in plan.num_new.items():
            chain = hashlib.sha256(seq.request.digest.encode()).digest()
            tokens = np.concatenate((seq.tokens, np.array(plan.drafts.get(seq, []), np.int32)))
            assert len(seq.blocks) * BLOCK_TOKENS >= seq.num_computed + num_new
            for at in range(seq.num_computed + num_new):
                chain = hashlib.sha256(chain + tokens[at].tobytes()).digest()
                slot = (seq.blocks[at // BLOCK_TOKENS], at % BLOCK_TOKENS)
                if at < seq.num_computed:
                    assert self.slots[slot] == chain, f"{seq.rid} reads a wrong cache entry at {at}"
                else:
                    self.slots[slot] = chain


class BatcherMachine(RuleBasedStateMachine):
    """Requests of three adapters with shared prefixes arrive, run and are cancelled; adapters become resident late."""

    @initialize(
        num_blocks=st.integers(6, 20), step_tokens=st.integers(4, 40), prefix_cache=st.booleans(),
        drafts=st.sampled_from([0, 3, 20]), has_model=st.booleans(), token_s=st.sampled_from([0.0, 0.1, 2.0]),
        slowdown=st.sampled_from([0.0, 1.0, 1.5]), batch_slowdown=st.sampled_from([0.0, 1.1]),
    )  # fmt: skip
    def start(
        self, num_blocks: int, step_tokens: int, prefix_cache: bool, drafts: int, has_model: bool, token_s: float,
        slowdown: float, batch_slowdown: float,
    ) -> None:  # fmt: skip
        self.limits = BatchLimits(4, step_tokens, prefix_cache, drafts, step_tokens, slowdown, batch_slowdown)
        self.slots = FakeSlots()
        self.blocks = BlockPool(num_blocks)
        self.drafts = FakeDrafts(self.limits) if has_model and drafts else None
        self.batcher = Batcher(self.limits, self.blocks, self.slots, "base", draft_model=self.drafts)
        self.batcher.step_model = StepModel(a=1.0, b=token_s, c=token_s / 100, d=token_s / 50)
        self.paused = False
        self.has_changed = False  # whether the last plan changed which sequences yield
        self.idle_plans: dict[Sequence, int] = {}  # yielding sequence that decodes -> plans since it last took part
        self.cache = Cache()
        self.rng = np.random.default_rng(0)
        self.max_len = num_blocks * BLOCK_TOKENS
        self.count = 0

    @rule(
        kind=st.integers(0, 2), length=st.integers(1, 80), max_new=st.integers(1, 40),
        digest=st.sampled_from(["", "a", "b"]), resumed=st.integers(0, 20), level=st.integers(0, 2),
        tenant=st.sampled_from(["", "s", "t"]),
    )  # fmt: skip
    def add(
        self, kind: int, length: int, max_new: int, digest: str, resumed: int, level: int, tenant: str
    ) -> None:  # fmt: skip
        length = min(length, self.max_len - 1)
        max_new = min(max_new, self.max_len - length)
        prompt = np.arange(length) * (kind + 1)
        output = [7 * kind] * min(resumed, max_new - 1)
        self.count += 1
        seq = make_seq(
            str(self.count), prompt, max_new, digest, output, yields=level == 1, batch=level == 2, tenant=tenant
        )  # fmt: skip
        seq.drafter = Drafter(self.limits.max_draft_tokens) if self.limits.max_draft_tokens else None
        self.batcher.add(seq)

    @rule(digest=st.sampled_from(["a", "b"]))
    def adapter_arrives(self, digest: str) -> None:
        self.slots.resident.add(digest)

    @rule(digest=st.sampled_from(["a", "b"]))
    def adapter_leaves(self, digest: str) -> None:
        if not self.slots.refs.get(digest):
            self.slots.resident.discard(digest)

    @precondition(lambda self: len(self.batcher) > 0)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.batcher.remove(data.draw(st.sampled_from(list(self.batcher))))

    @rule()
    def step(self) -> None:
        running = list(self.batcher.running)
        before = {seq: seq.priority for seq in self.batcher}  # a sequence passed over too often ceases to yield
        plan = self.batcher.plan()
        after = {seq: seq.priority for seq in self.batcher}  # a sequence of the heaviest tenant begins to yield
        self.has_changed, self.levels = before != after, sorted(set(after.values()))
        has_others = not self.has_changed and (self.levels[:1] == [0] or len(self.levels) > 1)
        assert plan.num_tokens <= self.limits.max_step_tokens
        assert len(self.batcher.running) <= self.limits.max_num_seqs
        assert set(plan.num_new) <= set(self.batcher.running)
        if has_others and any(self.yields(seq) and seq.num_pending > 1 for seq in plan.num_new):
            num_tokens = plan.num_tokens - sum(map(len, plan.drafts.values()))
            assert num_tokens <= self.limits.short_step_tokens, "a yielding prompt in a long step"
        for seq in plan.preempted:
            assert not any(other.priority > seq.priority for other in self.batcher.running), "these are the first to go"
        self.check_turns(plan, [seq for seq in running if seq.num_pending == 1 and seq not in plan.preempted])
        if any(not seq.request.digest or seq.request.digest in self.slots.resident for seq in self.batcher):
            assert plan.num_new, "nothing runs though something could"
        self.cache.run(plan)
        self.batcher.complete(plan)
        for seq in plan.num_new:
            if seq.num_pending == 0:
                draft = plan.drafts.get(seq, [])
                num_right = int(self.rng.integers(len(draft) + 1))
                for token in draft[:num_right]:
                    seq.append(token)
                seq.append(int(self.rng.integers(5)))
                if draft:
                    self.batcher.learn(seq, plan, num_right)
                if seq.num_tokens >= seq.max_tokens:
                    self.batcher.remove(seq)

    def check_turns(self, plan: StepPlan, decodes: list[Sequence]) -> None:
        """Check that decodes that do not yield are in every step, and others where time is left, else in rotation."""
        others = [seq for seq in decodes if not self.yields(seq)]
        yielding = [seq for seq in decodes if self.yields(seq) and seq.priority in self.levels[:2]]
        assert list(plan.num_new)[: len(others)] == others, "everybody who does not yield is in every step"
        taking_part = [seq for seq in plan.num_new if self.yields(seq)]
        if self.limits.max_batch_slowdown and self.levels[:2][-1:] == [2]:
            self.check_batch(plan, others, taking_part)
            return
        if len(self.levels) > 2 and not self.has_changed:
            assert not plan.num_new or {seq.priority for seq in plan.num_new} in ({2}, *LOWER), "batch work waits"
        is_limited = bool(self.limits.max_slowdown and others)
        was_paused, self.paused = self.paused, bool(yielding) and not taking_part
        if self.paused:
            assert not was_paused, "never twice in a row"
            has_prompt = plan.num_new.keys() - set(others)
            assert is_limited or (has_prompt and self.batcher.step_model.b > 0), "nobody has anything of it"
        elif not is_limited:
            assert list(plan.num_new)[: len(others) + len(yielding)] == [*others, *yielding]
        elif taking_part:
            self.check_time(plan, others, taking_part, self.limits.max_slowdown)
        for seq in yielding:
            self.idle_plans[seq] = 0 if seq in plan.num_new else self.idle_plans.get(seq, 0) + 1
            assert self.idle_plans[seq] <= 3 * self.limits.max_num_seqs, "it has waited for more than a round"

    def yields(self, seq: Sequence) -> bool:
        """Return whether a sequence yields to others that are present or may come."""
        return seq.priority > (self.levels[0] if len(self.levels) > 1 else 0)

    def check_batch(self, plan: StepPlan, others: list[Sequence], taking_part: list[Sequence]) -> None:
        """Check that batch work shares no step with another request's prompt, and lengthens none beyond its limit."""
        self.paused = False
        if set(plan.num_new) - set(others) - set(taking_part):
            assert not taking_part, "beside a prompt"
        elif others and taking_part:
            self.check_time(plan, others, taking_part, self.limits.max_batch_slowdown)

    def check_time(
        self, plan: StepPlan, others: list[Sequence], yielding: list[Sequence], slowdown: float
    ) -> None:  # fmt: skip
        """Check the limit of a step: it may be exceeded by at most the first sequence that yields."""
        model = self.batcher.step_model
        limit_s = slowdown * predicted_s(plan, others, model) * (1 + 1e-9)
        is_one_token = len(yielding) == 1 and plan.num_new[yielding[0]] == 1
        assert is_one_token or predicted_s(plan, [*others, *yielding], model) <= limit_s

    @invariant()
    def consistent(self) -> None:
        self.batcher.check_integrity()
        used = {block for seq in self.batcher for block in seq.blocks}
        assert self.blocks.num_free + len(used) == self.blocks.num_blocks
        refs = [seq.request.digest for seq in self.batcher.running if seq.request.digest]
        assert {d: n for d, n in self.slots.refs.items() if n} == {d: refs.count(d) for d in set(refs)}

    def teardown(self) -> None:
        """Check that everything ends within a bounded number of steps once all adapters are resident."""
        if not hasattr(self, "batcher"):
            return
        self.slots.resident = {"a", "b"}
        most = sum(2 * seq.max_tokens for seq in self.batcher) + MAX_SKIPS
        for _ in range(most):
            if not len(self.batcher):
                break
            self.step()
        assert not len(self.batcher)
        assert self.blocks.num_free == self.blocks.num_blocks


def predicted_s(plan: StepPlan, seqs: Iterable[Sequence], model: StepModel) -> float:
    """Return the predicted time, s, of a step with only these sequences of the plan, without draft tokens."""
    num_new = {seq: plan.num_new[seq] - len(plan.drafts.get(seq, ())) for seq in seqs}
    num_kv = sum(seq.num_computed + num for seq, num in num_new.items())
    ranks = 16 * len({seq.request.digest for seq in num_new if seq.request.digest})
    return model.seconds(sum(num_new.values()), num_kv, ranks)


LOWER = [{0}, {1}, {0, 1}]

TestBatcherMachine = BatcherMachine.TestCase
TestBatcherMachine.settings = settings(max_examples=examples.of(40), stateful_step_count=40, deadline=None)


def test_a_long_prompt_is_computed_in_chunks_beside_decodes() -> None:
    batcher, _ = make_batcher(64, max_step_tokens=32)
    short, long = make_seq("short", np.arange(4), 50), make_seq("long", np.arange(100), 50)
    batcher.add(short)
    finish_step(batcher, batcher.plan())
    batcher.add(long)
    chunks = []
    while long.num_computed < 100:
        plan = batcher.plan()
        assert plan.num_new[short] == 1
        chunks.append(plan.num_new[long])
        finish_step(batcher, plan)
    assert chunks == [31, 31, 31, 7]


def test_a_second_equal_prompt_computes_only_its_last_block() -> None:
    batcher, _ = make_batcher(64)
    first, second = make_seq("1", np.arange(48), 4), make_seq("2", np.arange(48), 4)
    batcher.add(first)
    finish_step(batcher, batcher.plan())
    batcher.add(second)
    assert batcher.plan().num_new[second] == 16
    assert second.num_cached == 32
    assert second.blocks[:2] == first.blocks[:2]


def test_another_adapter_shares_no_block() -> None:
    batcher, slots = make_batcher(64)
    slots.resident = {"a"}
    batcher.add(make_seq("1", np.arange(48), 4))
    finish_step(batcher, batcher.plan())
    other = make_seq("2", np.arange(48), 4, digest="a")
    batcher.add(other)
    assert batcher.plan().num_new[other] == 48


def activated(rid: str, prompt: np.ndarray, active_from: int, num_base: int) -> Sequence:
    """Return a sequence whose adapter sets in at token `active_from`; the first `num_base` tokens are as the base's."""
    seq = make_seq(rid, prompt, 4, digest="a")
    seq.activates, seq.active_from, seq.num_base = True, active_from, num_base
    return seq


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        ((40, 40), None, 2),  # before the invocation the blocks are the base model's, in either order
        (None, (40, 40), 2),
        ((40, 40), (40, 40), 3),
        ((40, 40), (24, 24), 1),
        ((40, 40), (20, 20), 1),
        ((0, 0), (40, 40), 0),
        ((0, 0), (40, 0), 0),  # the adapter also changes tokens before it sets in: no block is the base model's
        ((40, 0), (40, 0), 3),
        ((40, 0), None, 0),
        ((1 << 40, 1 << 40), None, 3),  # the adapter never sets in
    ],
)
def test_blocks_before_an_invocation_are_shared_with_the_base(
    first: tuple[int, int] | None, second: tuple[int, int] | None, shared: int
) -> None:
    batcher, slots = make_batcher(64, max_step_tokens=256)
    slots.resident = {"a"}
    prompt = np.arange(50)
    seqs = [make_seq(str(i), prompt, 4) if at is None else activated(str(i), prompt, *at) for i, at in
            enumerate((first, second))]  # fmt: skip
    batcher.add(seqs[0])
    finish_step(batcher, batcher.plan())
    batcher.add(seqs[1])
    assert batcher.plan().num_new[seqs[1]] == 50 - 16 * shared
    batcher.check_integrity()


def test_a_request_not_bound_to_its_adapter_waits() -> None:
    batcher, slots = make_batcher(64)
    slots.resident = {"a"}
    seq = make_seq("x", np.arange(8), 4, digest="a")
    seq.is_bound = False
    batcher.add(seq)
    assert not batcher.plan().num_new
    seq.is_bound = True
    assert batcher.plan().num_new == {seq: 8}


def test_a_request_without_its_adapter_is_passed_over() -> None:
    batcher, slots = make_batcher(64)
    cold, warm = make_seq("cold", np.arange(8), 4, digest="a"), make_seq("warm", np.arange(8), 4)
    batcher.add(cold)
    batcher.add(warm)
    assert list(batcher.plan().num_new) == [warm]
    slots.resident = {"a"}
    assert set(batcher.plan().num_new) == {cold, warm}
    assert cold.slot == ord("a")


def test_the_latest_arrival_is_preempted_and_keeps_its_tokens() -> None:
    batcher, _ = make_batcher(4, prefix_cache=False)
    first, second = make_seq("1", np.arange(31), 20), make_seq("2", np.arange(15), 20)
    batcher.add(first)
    finish_step(batcher, batcher.plan())
    batcher.add(second)
    preempted = []
    for _ in range(4):
        plan = batcher.plan()
        preempted += plan.preempted
        finish_step(batcher, plan)
    assert preempted == [second]
    assert second.num_computed == 0
    assert second.num_tokens > 15
    assert list(batcher.waiting) == [second]
    batcher.remove(first)
    assert batcher.plan().num_new == {second: second.num_tokens}


@pytest.mark.parametrize("yields", [False, True])
def test_small_requests_overtake_a_large_one_only_for_a_while(yields: bool) -> None:
    """One that yields ceases to first, which takes it one step more."""
    batcher, _ = make_batcher(8, prefix_cache=False)
    holder = make_seq("holder", np.arange(16), 1000)
    batcher.add(holder)
    batcher.complete(batcher.plan())
    large = make_seq("large", np.arange(112), 4, yields=yields)
    batcher.add(large)
    overtaking = 0
    for i in range(2 * MAX_SKIPS):
        small = make_seq(f"small{i}", np.arange(8), 1)
        batcher.add(small)
        plan = batcher.plan()
        batcher.complete(plan)
        if small in plan.num_new:
            overtaking += 1
            batcher.remove(small)
    assert overtaking == MAX_SKIPS + yields
    batcher.remove(holder)
    assert large in batcher.plan().num_new


def test_others_take_the_places_of_the_latest_yielding_sequences() -> None:
    batcher, slots = make_batcher(64, max_num_seqs=3)
    slots.resident = {"a"}
    flood = [make_seq(f"flood{i}", np.arange(40) + 50 * i, 50, "a", yields=True) for i in range(2)]
    first = make_seq("first", np.arange(8) + 200, 50)
    for seq in (flood[0], first, flood[1]):
        batcher.add(seq)
        while seq.num_output == 0:
            finish_step(batcher, batcher.plan())
    cold = make_seq("cold", np.arange(8), 50, "b")
    quiet = [make_seq(f"quiet{i}", np.arange(8) + 300 + 10 * i, 50) for i in range(2)]
    batcher.add(cold)
    assert not batcher.plan().preempted, "for what cannot run"
    batcher.remove(cold)
    batcher.add(quiet[0])
    plan = batcher.plan()
    assert (plan.preempted, set(plan.num_new)) == ([flood[1]], {flood[0], first, quiet[0]})
    finish_step(batcher, plan)
    another = make_seq("another", np.arange(8) + 400, 50, yields=True)
    batcher.add(another)
    assert not batcher.plan().preempted, "nor for one that yields too"
    batcher.remove(another)
    batcher.remove(quiet[0])
    assert flood[1] in batcher.plan().num_new
    assert flood[1].num_computed == 32, "its full blocks are still there"
    for seq in quiet:
        batcher.add(seq)
    assert batcher.plan().preempted == [flood[1], flood[0]]
    assert batcher.running == [first, *quiet]


def test_others_take_the_blocks_of_yielding_sequences_if_that_is_enough() -> None:
    batcher, _ = make_batcher(8, prefix_cache=False)
    flood = [make_seq(f"flood{i}", np.arange(32) + 50 * i, 8, yields=True) for i in range(2)]
    for seq in flood:
        batcher.add(seq)
        finish_step(batcher, batcher.plan())
    large, small = make_seq("large", np.arange(140), 4), make_seq("small", np.arange(60), 4)
    batcher.add(large)
    assert not batcher.plan().preempted, "all of them would not do"
    batcher.remove(large)
    batcher.add(small)
    plan = batcher.plan()
    assert plan.preempted == [flood[1]]
    assert small in plan.num_new
    batcher.check_integrity()


def test_blocks_that_others_share_are_not_freed_by_taking_them() -> None:
    batcher, _ = make_batcher(8)
    holder = make_seq("holder", np.arange(65), 8)
    flood = make_seq("flood", np.arange(65), 8, yields=True)
    for seq in (holder, flood):  # five blocks each, four of them shared
        batcher.add(seq)
        finish_step(batcher, batcher.plan())
    batcher.add(
        make_seq("quiet", np.arange(40) + 100, 8)
    )  # two blocks are free, one of them reserved for growth: freeing one more is not enough
    assert not batcher.plan().preempted


def test_hits_on_free_blocks_count_as_taken() -> None:
    batcher, _ = make_batcher(6)
    first = make_seq("first", np.arange(33), 40)
    batcher.add(first)
    finish_step(batcher, batcher.plan())
    batcher.remove(first)
    holder = make_seq("holder", np.arange(40) + 100, 40)
    batcher.add(holder)
    finish_step(batcher, batcher.plan())
    # Two of three free blocks hold the prefix: a third one for `again` and a spare one for the holder do not fit.
    again = make_seq("again", np.arange(33), 40)
    batcher.add(again)
    assert list(batcher.plan().num_new) == [holder]


def test_a_request_that_is_not_admitted_uses_up_no_prompt_rows() -> None:
    batcher, _ = make_batcher(64, max_step_tokens=512, prefix_cache=False)
    cold, warm = make_seq("cold", np.arange(200), 4, "a"), make_seq("warm", np.arange(200), 4)
    for seq in (cold, warm):
        seq.prompt_logprobs = PromptLogprobs(seq.request.prompt, 0)
        batcher.add(seq)
    assert batcher.plan().num_new == {warm: 200}, "of 256 rows; the other one's adapter is not here"


def test_a_preempted_request_gives_its_prompt_rows_back() -> None:
    batcher, _ = make_batcher(14, max_step_tokens=512, prefix_cache=False)
    prompts = [make_seq(str(i), np.arange(100), 4) for i in range(2)]
    for seq in prompts:
        seq.prompt_logprobs = PromptLogprobs(seq.request.prompt, 0)
    holder = make_seq("holder", np.arange(16), 40)
    batcher.add(holder)
    finish_step(batcher, batcher.plan())
    batcher.add(prompts[0])
    plan = batcher.plan()
    assert plan.num_prompt_rows == 100
    batcher._preempt(prompts[0], plan)
    assert plan.num_prompt_rows == 0
