"""Measured streams, while other requests run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from lorafleet.bench import BenchConfig, BenchRequest, BenchResult, BenchTarget, run_load
from lorafleet.bench.result import inter_token_gaps_s


@dataclass(frozen=True, slots=True)
class Beside:
    """The records of the measured streams and of the other requests."""

    measured: BenchResult
    others: list[BenchRequest]  # those that ended before the last measured stream

    def gaps_ms(self) -> np.ndarray:
        """Return the inter-token gaps of all measured streams, ms: float64."""
        return 1e3 * inter_token_gaps_s(self.measured.records)

    def texts(self) -> list[tuple[str, str]]:
        """Return the target and the text of each measured stream, sorted."""
        return sorted((record.target, record.text) for record in self.measured.records)


def run_beside(config: BenchConfig, others: BenchConfig | None) -> Beside:
    """Run `config` to its end while `others` run, then cancel those. Raises RuntimeError if a request fails."""
    return asyncio.run(_run_beside(config, others))


async def _run_beside(config: BenchConfig, others: BenchConfig | None) -> Beside:
    ended: list[BenchRequest] = []
    task = asyncio.create_task(run_load(others, ended.append)) if others is not None else None
    try:
        measured = await run_load(config)
    finally:
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
    errors = [record.error for record in (*measured.records, *ended) if record.error is not None]
    if errors:
        raise RuntimeError(f"{len(errors)} requests failed: {errors[0]}")
    return Beside(measured, ended)


def streams(url: str, names: Sequence[str], output_tokens: int) -> BenchConfig:
    """Return a load of one stream per adapter, all at the same time."""
    targets = tuple(BenchTarget.model(name) for name in names)
    num = len(names)
    return BenchConfig(
        url=url, targets=targets, num_requests=num, concurrency=num, prompt_words=16, output_tokens=output_tokens
    )
