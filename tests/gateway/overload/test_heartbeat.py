"""Heartbeats of a gateway whose event loop is blocked, and the measured lag of the loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis
from helpers.clocks import ScaledClock
from helpers.scripted_fleet import ScriptedFleet, running_gateway
from helpers.waiting import wait_until

from gateway.overload.heartbeat import Heartbeat, LoopLag, Pace
from gateway.service import GatewayTimings
from protocol.queue.bus import Bus

TICK_S = 0.1


def lag_after(*delays_s: float, overdue_s: float = 0.0) -> float:
    """Return the lag of a loop whose ticks had the given delays, with the next tick overdue."""
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
    bus: Bus, fleet: ScriptedFleet, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its heartbeat continues, so that its calls are not cancelled."""
    clock = ScaledClock()
    pace = Pace(beat_s=0.02, clock=clock)
    async with running_gateway(bus, model_folder, GatewayTimings(pace=pace)) as gateway:
        key, num_beats, last_ms = bus.keys.gateway_beat(gateway.gid), 0, 0
        with redis.Redis.from_url(bus.url) as queue:  # a client without an event loop, as the loop is blocked here

            def left_ms() -> int:
                return int(queue.pttl(key))  # type: ignore[arg-type]

            def wait_for_refused_beats(num: int) -> None:
                while caplog.text.count("no heartbeat: the event loop has been blocked") < num:
                    left_ms()

            clock.speed = 0.0  # however slow this machine is, the loop has not been blocked for long yet
            while num_beats < 5:
                now_ms = left_ms()
                assert now_ms > 0, "the gateway counts as dead"
                num_beats += now_ms > last_ms
                last_ms = now_ms
            clock.speed = 10_000.0
            wait_for_refused_beats(1)
            queue.delete(key)
            wait_for_refused_beats(3)
            assert not queue.exists(key)
            clock.speed = 1.0

        async def is_back() -> bool:
            return bool(await bus._redis.exists(key))

        await wait_until(is_back, "the loop turns again")


class Dying(Heartbeat):
    """A heartbeat whose thread dies."""

    async def _beats(self, address: str) -> None:
        raise SystemExit  # not an `Exception`, like a panic in a Rust library


async def test_a_gateway_whose_heartbeat_has_died_ends(bus: Bus) -> None:
    heartbeat = Dying(bus.url, "g-dying", Pace(tick_s=0.01))
    async with heartbeat.beating(bus, "127.0.0.1:1"):
        with pytest.raises(RuntimeError, match="heartbeat"):
            await heartbeat.tick()
