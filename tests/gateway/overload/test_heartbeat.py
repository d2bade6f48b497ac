"""What a gateway's beat says, and how late its event loop is taken to be."""

from __future__ import annotations

from pathlib import Path

import redis
from scripted_fleet import ScriptedFleet, running_gateway
from waiting import wait_until

from gateway.overload.heartbeat import LoopLag, Pace
from gateway.service import Tuning
from protocol.queue.bus import Bus

TICK_S = 0.1


def lag_after(*delays_s: float, overdue_s: float = 0.0) -> float:
    """Return the lag of a loop whose ticks came so late, and whose next one is overdue."""
    now_s, lag = 0.0, LoopLag(TICK_S, 0.0)
    for delay_s in delays_s:
        now_s += TICK_S + delay_s
        lag.tick(now_s)
    return lag.lag_s(now_s + TICK_S + overdue_s)


def test_only_a_loop_that_stays_late_is_late() -> None:
    assert lag_after(0.0, 0.0, 0.0) < 0.001
    assert lag_after(60.0, 60.0, 0.0) < 0.001
    assert lag_after(0.0, 60.0) < 0.001
    assert abs(lag_after(5.0, 3.0, 9.0) - 3.0) < 0.001


def test_the_turn_that_lasts_now_counts() -> None:
    assert lag_after(0.0, 3.0, 3.0) < 0.001
    assert abs(lag_after(0.0, 3.0, 3.0, overdue_s=2.5) - 2.5) < 0.001


async def test_a_gateway_whose_loop_stands_still_beats_until_it_is_stuck(
    bus: Bus, fleet: ScriptedFleet, model_folder: Path
) -> None:
    """Its beat goes on, so that nobody cancels what it has let in."""
    pace = Pace(beat_s=0.02, ttl_ms=400, stuck_s=1.0)
    async with running_gateway(bus, model_folder, tuning=Tuning(pace=pace)) as gateway:
        key, num_beats, last_ms = bus.keys.gateway_beat(gateway.gid), 0, 0
        with redis.Redis.from_url(bus.url) as queue:  # one that waits for answers without the loop

            def left_ms() -> int:
                return int(queue.pttl(key))  # type: ignore[arg-type]

            while num_beats < 5:
                now_ms = left_ms()
                assert now_ms > 0, "the gateway counts as dead"
                num_beats += now_ms > last_ms
                last_ms = now_ms
            while queue.exists(key):
                pass

        async def is_back() -> bool:
            return bool(await bus.redis.exists(key))

        await wait_until(is_back, "the loop turns again")
