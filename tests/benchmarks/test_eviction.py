"""The simulation of eviction policies: its counts add up, and the worker's own pool loads less often than LRU."""

from __future__ import annotations

from benchmarks.simulation.eviction import run


def test_gdsf_loads_less_than_lru_and_a_pool_for_all_loads_each_once() -> None:
    small = {"num_adapters": 300, "num_slots": 20, "num_requests": 3000, "num_running": 8}
    lru, gdsf = (run(policy, 1.0, **small) for policy in ("LRU", "GDSF"))
    assert gdsf.num_loads < lru.num_loads
    assert gdsf.loaded_bytes < lru.loaded_bytes
    assert abs(lru.hit_rate - (1 - lru.num_loads / 2700)) < 1e-4
    assert run("GDSF", 1.0, **(small | {"num_slots": 1000})).num_loads < 300
