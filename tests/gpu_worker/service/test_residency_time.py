"""The time that adapters spend in a pool: each look adds the time since the previous one."""

from __future__ import annotations

from gpu_worker.service.residency_time import TELL_S, ResidencyTime
from peft_adapters.recipe import PREFIX


def test_time_is_counted_from_look_to_look_and_told_now_and_then() -> None:
    clock = ResidencyTime(100.0)
    clock.look(["a", f"{PREFIX}x"], 101.0)
    clock.look(["a", "b"], 102.5)
    assert clock.take(102.5) == {}
    clock.look(["b"], 100.0 + TELL_S)
    assert clock.take(100.0 + TELL_S) == {"a": 2500, "b": 29_000}
    clock.look(["a"], 131.0)
    assert clock.take(131.0) == {}
    assert clock.take(131.0, at_once=True) == {"a": 1000}


def test_time_in_no_pool_is_nobodys() -> None:
    clock = ResidencyTime(0.0)
    clock.look([], 1000.0)
    clock.look(["a"], 1001.0)
    assert clock.take(1001.0) == {"a": 1000}
