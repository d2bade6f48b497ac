"""Adapters between host memory and the pool: who waits, who leaves, who is never pushed out."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gpu_worker.adapters.cache import MAX_STARVED_LOADS, NUM_STAGERS, AdapterCache
from gpu_worker.adapters.packing import HostAdapter, Packer
from gpu_worker.adapters.residency import Residency
from gpu_worker.adapters.weights import PoolWeights, split_budget
from gpu_worker.model.adaptable_modules import AdaptableModules
from gpu_worker.model.attention import StepContext
from gpu_worker.model.lora import SiteInfo
from lora_kernels.ops import PAGE_ROWS
from protocol.wire.errors import AdapterRefused, BadRequest, LorafleetError, NotFound
from protocol.wire.messages import AdapterEvent, ServedModel, SiteShape

SITES = [
    SiteInfo("model.layers.0.attn.q", 0, 0, 4, 6, "linear", torch.float32),
    SiteInfo("model.layers.0.mlp.up", 1, 1, 4, 8, "linear", torch.float32),
    SiteInfo("lm_head", 2, 2, 4, 10, "linear", torch.float32),
]
PAGE_BYTES = [PAGE_ROWS * 4 * 10, PAGE_ROWS * 4 * 12, PAGE_ROWS * 4 * 14]
ATTENTION = 1 << 0
MLP = 1 << 1


def make_adapter(digest: str, rank: int, where: int = ATTENTION) -> HostAdapter:
    """Return an adapter of one rank on the groups in `where`, all its numbers being a hash of its name."""
    value = float(sum(digest.encode()))
    rows = []
    ranks = np.zeros(len(SITES), np.int32)
    for site in SITES:
        if where & 1 << site.group:
            ranks[site.index] = rank
            a, b = torch.full((rank, site.in_features), value), torch.full((rank, site.out_features), -value)
            rows.append((site.index, a, b))
    pages = tuple(-(-rank // PAGE_ROWS) if where & 1 << group else 0 for group in range(4))
    num_bytes = sum(a.nbytes + b.nbytes for _, a, b in rows)
    return HostAdapter(digest, ranks, np.full(len(SITES), 0.5, np.float32), rows, pages, num_bytes)


class Loading:
    """A cache over a pool of a few pages whose loaders' news can be awaited."""

    def __init__(self, num_pages: int, adapters: list[HostAdapter], host_bytes: int = 1 << 20) -> None:
        budget = num_pages * (PAGE_BYTES[0] + PAGE_BYTES[1]) + PAGE_BYTES[2]
        self.weights = PoolWeights(SITES, [], budget, "cpu")
        self.known = {adapter.digest: adapter for adapter in adapters}
        self.reads: list[str] = []
        self.store_answers = threading.Event()
        self.store_answers.set()
        self.changed = threading.Event()
        self.evicted: list[str] = []
        self.cache = AdapterCache(self.weights, self._read, host_bytes)
        self.cache.on_loaded = self.changed.set
        self.cache.on_evicted = self.evicted.append

    def _read(self, digest: str) -> HostAdapter:
        self.reads.append(digest)
        assert self.store_answers.wait(timeout=60)
        if digest not in self.known:
            raise NotFound(f"no adapter store has the adapter {digest}")
        return self.known[digest]

    def load(self, *wanted: str, until: str) -> None:
        """Ask for adapters until one of them is resident."""
        while until not in self.cache.resident:
            self.changed.clear()
            assert not self.cache.poll()
            assert not self.cache.load(wanted)
            if until not in self.cache.resident and self.cache.loading:
                assert self.changed.wait(timeout=60)


def test_rows_land_in_the_pages_the_table_names() -> None:
    adapters = [make_adapter("a", 20), make_adapter("b", 3, ATTENTION | MLP)]
    loading = Loading(4, adapters)
    loading.load("a", "b", until="a")
    loading.load("a", "b", until="b")
    table = loading.weights.table
    for adapter in adapters:
        slot = loading.cache.acquire(adapter.digest)
        assert slot is not None
        assert table.ranks[slot].tolist() == adapter.ranks.tolist()
        for index, a, b in adapter.rows:
            site = loading.weights.lora_sites[index]
            pages = table.pages[slot, site.group].tolist()
            at = [pages[row // PAGE_ROWS] * PAGE_ROWS + row % PAGE_ROWS for row in range(len(a))]
            assert torch.equal(site.a_rows[at], a)
            assert torch.equal(site.b_rows[at], b)
        loading.cache.release(adapter.digest)


def test_an_idle_adapter_leaves_for_a_wanted_one_and_comes_back_from_the_host() -> None:
    loading = Loading(1, [make_adapter("a", 8), make_adapter("b", 8)])
    loading.load("a", until="a")
    loading.load("b", until="b")
    assert loading.evicted == ["a"]
    loading.load("a", until="a")
    assert loading.reads == ["a", "b"]
    assert (loading.cache.num_fetches, loading.cache.num_loads) == (2, 3)
    assert loading.cache.pool.residents.keys() == {"a"}


def test_what_loads_adapters_waits_for_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    policies: dict[str, int] = {}
    loading = Loading(1, [make_adapter("a", 8)])

    def noting(job: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            own = threading.current_thread()
            policies[own.name.split("_")[0]] = os.sched_getscheduler(0)
            return job(*args)

        return run

    monkeypatch.setattr(loading.cache, "_read", noting(loading.cache._read))
    monkeypatch.setattr(loading.weights, "copy", noting(loading.weights.copy))
    loading.load("a", until="a")
    assert policies == {"stager": os.SCHED_IDLE, "copier": os.SCHED_IDLE}
    assert os.sched_getscheduler(0) != os.SCHED_IDLE


def test_an_adapter_in_use_stays() -> None:
    loading = Loading(1, [make_adapter("a", 8), make_adapter("b", 8)])
    loading.load("a", until="a")
    loading.cache.acquire("a")
    loading.cache.prefetch("b")
    while "b" not in loading.cache.host:
        assert loading.changed.wait(timeout=60)
        loading.changed.clear()
        loading.cache.poll()
    loading.cache.load(["b"])
    assert loading.cache.loading == []
    assert loading.cache.resident == ["a"]
    loading.cache.release("a")
    loading.load("b", until="b")


def test_a_more_urgent_waiting_request_keeps_its_adapter() -> None:
    loading = Loading(1, [make_adapter("a", 8), make_adapter("b", 8)])
    loading.load("a", "b", until="a")
    for _ in range(3):
        loading.cache.load(["a", "b"])
        loading.cache.poll()
    assert loading.cache.resident == ["a"]
    loading.load("b", "a", until="b")


def test_a_store_that_does_not_answer_stops_no_copy_from_the_host() -> None:
    stuck = [make_adapter(f"stuck{i}", 8) for i in range(2 * NUM_STAGERS)]
    loading = Loading(1, [make_adapter("a", 8), make_adapter("b", 8), *stuck])
    loading.load("a", until="a")
    loading.load("b", until="b")
    loading.store_answers.clear()
    loading.cache.load([adapter.digest for adapter in stuck])
    loading.load("a", *[adapter.digest for adapter in stuck], until="a")
    loading.store_answers.set()


def test_a_starved_adapter_gets_its_turn() -> None:
    """Requests for `a` overlap without end; after a while no new one is taken until `b` has been loaded."""
    loading = Loading(1, [make_adapter("a", 8), make_adapter("b", 8)])
    loading.load("a", until="a")
    assert loading.cache.acquire("a") is not None
    refused = 0
    for _ in range(3 * MAX_STARVED_LOADS):
        loading.cache.poll()
        loading.cache.load(["b"])
        if loading.cache.acquire("a") is not None:
            loading.cache.release("a")  # another request of `a` has come and one has gone
        else:
            refused += 1
        if "b" not in loading.cache.host:
            assert loading.changed.wait(timeout=60)
    assert refused > 0
    assert loading.cache.resident == ["a"]
    loading.cache.release("a")
    loading.load("b", until="b")
    loading.load("a", until="a")
    assert loading.cache.acquire("a") is not None, "a is welcome again"


def test_prefetching_sends_nobody_away() -> None:
    loading = Loading(1, [make_adapter("a", 8), make_adapter("b", 8)])
    loading.load("a", until="a")
    loading.cache.prefetch("b")
    while "b" not in loading.cache.host:
        assert loading.changed.wait(timeout=60)
        loading.changed.clear()
        loading.cache.poll()
    assert loading.cache.resident == ["a"]
    assert loading.cache.loading == []


def test_the_host_keeps_what_is_wanted_and_drops_the_oldest_of_the_rest() -> None:
    adapters = [make_adapter(name, 8) for name in "abcd"]
    loading = Loading(1, adapters, host_bytes=2 * adapters[0].num_bytes)
    for name in "abc":
        loading.load(name, until=name)
    assert list(loading.cache.host) == ["b", "c"]
    loading.load("a", "b", until="a")
    assert "b" in loading.cache.host
    assert loading.cache.host.num_bytes == sum(loading.known[name].num_bytes for name in loading.cache.host)


class Ordered(Loading):
    """A cache with pins and evictions, kept as the engine does it: load what is wanted, then evict what may leave."""

    def __init__(self, num_pages: int, adapters: list[HostAdapter]) -> None:
        super().__init__(num_pages, adapters)
        self.residency = Residency(self.cache)
        self.queued: list[str] = []

    def run(self) -> list[AdapterEvent]:
        """Step until nothing is on its way any more; returns what was told of evictions."""
        events: list[AdapterEvent] = []
        while True:
            self.changed.clear()
            self.residency.note(self.cache.poll())
            self.residency.note(self.cache.load([*self.queued, *self.residency.wanted()]))
            self.residency.settle(self.queued)
            events += [event for event in self.cache.events.take()[0] if event.kind == "evicted"]
            if not self.cache.loading:
                return events
            assert self.changed.wait(timeout=60)


def test_a_pinned_adapter_comes_and_stays() -> None:
    loading = Ordered(2, [make_adapter(name, 8) for name in "abc"])
    loading.residency.pin("a")
    assert loading.run() == []
    assert loading.cache.resident == ["a"]
    for name in "bcb":
        loading.queued = [name]
        loading.run()
        assert sorted(loading.cache.resident) == ["a", name]
    loading.residency.unpin("a")
    loading.queued = ["b", "c"]
    assert [event.digest for event in loading.run()] == ["a"]
    assert loading.residency.pins == {}


def test_pins_take_at_most_half_of_the_pool() -> None:
    """The one too many is served like any other, says why it is not kept, and is kept once there is room."""
    loading = Ordered(4, [make_adapter(name, 8) for name in "abcd"] + [make_adapter("wide", 33)])
    for name in "abc":
        loading.residency.pin(name)
    loading.run()
    assert loading.residency.pins["a"] == loading.residency.pins["b"] == ""
    assert "half of the pool" in loading.residency.pins["c"]
    failed = {}
    loading.cache.load(["wide"])
    while not failed:
        loading.changed.wait(timeout=60)
        loading.changed.clear()
        failed = {**loading.cache.poll(), **loading.cache.load(["wide"])}
    assert "pinned adapters leave less" in failed["wide"].message
    assert failed["wide"].retryable
    loading.residency.unpin("a")
    loading.residency.pin("c")
    loading.run()
    assert loading.residency.pins == {"b": "", "c": ""}


def test_a_pin_that_fails_says_why_and_is_tried_when_it_is_ordered_again() -> None:
    loading = Ordered(2, [make_adapter("huge", 100)])
    loading.residency.pin("huge")
    loading.run()
    assert "bytes of the adapter pool" in loading.residency.pins["huge"]
    assert loading.residency.wanted() == []
    loading.residency.pin("huge")
    assert loading.residency.wanted() == ["huge"]


def test_one_that_failed_is_not_tried_by_every_request_but_by_a_new_pin() -> None:
    loading = Ordered(2, [])

    def ask() -> dict[str, LorafleetError]:
        failed = loading.cache.load(["a"])
        while loading.cache.loading:
            assert loading.changed.wait(timeout=60)
            loading.changed.clear()
            failed |= loading.cache.poll()
        return failed

    first, second = ask(), ask()
    assert first["a"] is second["a"]
    assert loading.reads == ["a"]
    loading.known["a"] = make_adapter("a", 8)
    assert ask() == first
    loading.residency.pin("a")
    loading.run()
    assert loading.cache.resident == ["a"]


def test_an_eviction_frees_pool_and_host_and_says_how_much() -> None:
    adapter = make_adapter("a", 8)
    loading = Ordered(2, [adapter, make_adapter("b", 8)])
    loading.queued = ["a"]
    loading.run()
    free_bytes = loading.cache.pool.free_bytes
    loading.residency.evict("a", "order 1")
    assert loading.run() == [], "requests wait for it"
    loading.queued = []
    loading.cache.acquire("a")
    assert loading.run() == [], "a request uses it"
    loading.cache.release("a")
    (told,) = loading.run()
    assert (told.digest, told.order) == ("a", "order 1")
    assert told.pool_bytes == loading.cache.pool.free_bytes - free_bytes == PAGE_BYTES[0]
    assert told.host_bytes == adapter.num_bytes
    assert loading.evicted == ["a"], "its KV blocks are the next to be reused"
    assert not loading.cache.resident
    assert "a" not in loading.cache.host
    loading.residency.evict("b", "order 2")
    (told,) = loading.run()
    assert (told.order, told.pool_bytes, told.host_bytes) == ("order 2", 0, 0), "it was not there"


def test_what_happens_is_told() -> None:
    loading = Ordered(1, [make_adapter("a", 8), make_adapter("b", 8)])
    loading.queued = ["a"]
    loading.run()
    loading.cache.events.record_use("a", resident=True)
    loading.cache.events.record_use("a", resident=False)
    loading.queued = ["b"]
    loading.load("b", until="b")
    events, uses = loading.cache.events.take()
    assert [(event.kind, event.digest) for event in events] == [("staged", "b"), ("evicted", "a"), ("resident", "b")]
    assert (uses["a"].hits, uses["a"].misses, uses["b"].fetches, uses["b"].loads) == (1, 1, 1, 1)


def test_a_budget_is_split_by_pages() -> None:
    assert split_budget([100, 300, 0], 4000) == [10, 10, 0]
    assert split_budget([100, 300, 1000], 21_000) == [47, 47, 2]
    assert split_budget([100, 0, 0], 1050) == [10, 0, 0]
    with pytest.raises(BadRequest, match="adapter_pool_bytes"):
        split_budget([100, 300, 0], 399)


def test_numbers_that_are_not_finite_in_the_pools_dtype_are_refused() -> None:
    from safetensors.torch import save

    sites = [SiteInfo("layers.0.q", 0, 0, 4, 6, "linear", torch.float16)]
    served = ServedModel(
        model="m", name="m", fingerprint="", model_type="", vocab_size=10, max_model_len=10,
        sites=[SiteShape("layers.0.q", 4, 6)],
    )  # fmt: skip
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}

    def pack(largest: float) -> HostAdapter:
        a, b = torch.ones(2, 4), torch.full((6, 2), largest)
        names = ("base_model.model.layers.0.q.lora_A.weight", "base_model.model.layers.0.q.lora_B.weight")
        packer = Packer(sites, served, AdaptableModules(StepContext()), pin=False)
        return packer.pack("d", config, save(dict(zip(names, (a, b), strict=True))))

    assert pack(60_000.0).num_pages == (1, 0, 0, 0)
    for bad in (70_000.0, float("nan"), -float("inf")):
        with pytest.raises(AdapterRefused, match=r"not finite in .*lora_B"):
            pack(bad)
