"""Adapters between host memory and the pool: which are loaded, which are evicted, and which never are."""

from __future__ import annotations

import os
import threading

import torch
from helpers.adapter_loading import ATTENTION, MLP, SITES, Loading, RecordedStream, make_adapter, rows_of

from gpu_worker.adapters.jobs import NUM_STAGERS
from gpu_worker.adapters.packing.packer import row_sites
from gpu_worker.adapters.priority import NICENESS
from gpu_worker.adapters.starvation import MAX_STARVED_LOADS
from lora_kernels.ops import PAGE_ROWS
from protocol.wire.errors import LorafleetError


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
        for index, a, b, _ in rows_of(adapter, row_sites(SITES)):
            site = loading.weights.lora_sites[index]
            pages = table.pages[slot, site.group].tolist()
            at = [pages[row // PAGE_ROWS] * PAGE_ROWS + row % PAGE_ROWS for row in range(len(a))]
            assert torch.equal(site.a_rows[at], a)
            assert torch.equal(site.b_rows[at], b)
        loading.cache.release(adapter.digest)


def test_an_idle_adapter_leaves_for_a_wanted_one_and_comes_back() -> None:
    loading = Loading(1, [make_adapter("a", 8), make_adapter("b", 8)])
    loading.load("a", until="a")
    loading.load("b", until="b")
    assert loading.evicted == ["a"]
    loading.load("a", until="a")
    assert loading.reads == ["a", "b"]
    assert (loading.cache.num_fetches, loading.cache.num_loads) == (2, 3)
    assert loading.cache.pool.residents.keys() == {"a"}


def test_what_brings_adapters_has_less_of_a_core_than_steps() -> None:
    niceness: dict[str, int] = {}

    def note() -> None:
        niceness[threading.current_thread().name.split("_")[0]] = os.nice(0)

    loading = Loading(1, [make_adapter("a", 8)], stream=RecordedStream(note))
    loading.on_read = note
    loading.load("a", until="a")
    own = os.nice(0)
    assert niceness == {"stager": own + NICENESS, "copier": own + NICENESS}
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_prefetching_sends_nobody_away_and_loading_nobody_in_use() -> None:
    loading = Loading(1, [make_adapter("a", 8), make_adapter("b", 8)])
    loading.load("a", until="a")
    loading.cache.prefetch("b")
    while "b" not in loading.cache.host:
        assert loading.changed.wait(timeout=60)
        loading.changed.clear()
        loading.cache.poll()
    assert (loading.cache.resident, loading.cache.loading) == (["a"], [])
    loading.cache.acquire("a")
    loading.cache.load(["b"])
    assert (loading.cache.resident, loading.cache.loading) == (["a"], [])
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
    """Requests for `a` overlap without end; after a while no new one is admitted until `b` has been loaded."""
    loading = Loading(1, [make_adapter("a", 8), make_adapter("b", 8)])
    loading.load("a", until="a")
    assert loading.cache.acquire("a") is not None
    refused = 0
    for _ in range(3 * MAX_STARVED_LOADS):
        loading.cache.poll()
        loading.cache.load(["b"])
        if loading.cache.acquire("a") is not None:
            loading.cache.release("a")  # a newer request holds `a`, and an older one has ended
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


def test_the_host_keeps_what_is_wanted_and_drops_the_oldest_of_the_rest() -> None:
    adapters = [make_adapter(name, 8) for name in "abcd"]
    loading = Loading(1, adapters, host_bytes=2 * adapters[0].num_bytes)
    for name in "abc":
        loading.load(name, until=name)
    assert list(loading.cache.host) == ["b", "c"]
    loading.load("a", "b", until="a")
    assert "b" in loading.cache.host
    assert loading.cache.host.num_bytes == sum(loading.known[name].num_bytes for name in loading.cache.host)


def test_what_no_pool_could_hold_is_neither_kept_nor_fetched_again() -> None:
    loading = Loading(1, [make_adapter("huge", 10_000), make_adapter("a", 8)])
    failed: dict[str, LorafleetError] = {}
    while not failed:
        loading.changed.clear()
        failed |= loading.cache.load(["huge"]) | loading.cache.poll()
        if not failed:
            assert loading.changed.wait(timeout=60)
    assert "bytes of the adapter pool" in failed["huge"].message
    assert list(loading.cache.host) == []
    loading.load("a", until="a")
    assert loading.cache.load(["huge"])["huge"].status == 422
    assert loading.reads == ["huge", "a"]
