"""Samples the fleet's state for charts from heartbeats, every few seconds."""

from __future__ import annotations

import logging

from gateway.fleet.timeseries import TIERS, FleetSample, TimeSeries
from gateway.fleet.view import FleetView
from protocol.queue.bus import Bus, now_ms
from protocol.wire import messages as m

logger = logging.getLogger(__name__)

SAMPLE_S = TIERS[0][0] / 2
"""Seconds between samples. Each reads all workers' heartbeats once."""


class Sampler:
    """Computes the increase of workers' counters since the previous sample."""

    def __init__(self, bus: Bus, view: FleetView, series: TimeSeries) -> None:
        self._bus = bus
        self._view = view
        self._series = series
        self._before: dict[str, m.WorkerCounters] = {}
        self.num_gateways = 1

    async def sample(self) -> None:
        """Add one sample. Raises a connection error."""
        beats = await self._bus.members.worker_beats()
        self.num_gateways = sum((await self._bus.members.gateways_alive()).values())
        counters = {wid: beat.counters for wid, beat in beats.items() if beat is not None}
        status = self._view.status or m.SchedulerStatus(queued=0, running=0, workers=0, drain_rate=0.0)
        oldest_ms = min(filter(None, status.oldest_ms.values()), default=0)
        sample = FleetSample(
            status.queued, status.running, max(0.0, (now_ms() - oldest_ms) / 1000) if oldest_ms else 0.0, len(counters)
        )
        for wid, now in counters.items():
            if (before := self._before.get(wid)) is not None:
                sample.output_tokens += max(0, now.num_output_tokens - before.num_output_tokens)
                sample.computed_tokens += max(0, now.num_computed_tokens - before.num_computed_tokens)
                sample.cached_tokens += max(0, now.num_cached_tokens - before.num_cached_tokens)
        self._before = counters
        self._series.sample(sample)
