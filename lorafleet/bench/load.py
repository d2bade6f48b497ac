"""Runs the planned load against a server and collects the records of its requests."""

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from lorafleet.bench.client import Client
from lorafleet.bench.result import BenchRequest, BenchResult
from lorafleet.bench.workload import BenchConfig, PlannedRequest, plan_requests, plan_warmup

OnRecord = Callable[[BenchRequest], None]


class WarmupError(RuntimeError):
    """A warm-up request has failed."""


def run_bench(config: BenchConfig, on_record: OnRecord | None = None) -> BenchResult:
    """Run the load of `config` to its end, on its own event loop.

    on_record: called with each measured request as it ends. A failed measured request is a record with `error` set.
    Raises WarmupError if a warm-up request fails, since the measurement would then mean something else.
    """
    return asyncio.run(run_load(config, on_record))


async def run_load(config: BenchConfig, on_record: OnRecord | None = None) -> BenchResult:
    """Do the same as `run_bench`, on the running event loop."""
    client = Client(config.url, config.api_key)
    try:
        await _run(config, client, plan_warmup(config), _refuse_failure)
        records: list[BenchRequest] = []

        def note(record: BenchRequest) -> None:
            records.append(record)
            if on_record is not None:
                on_record(record)

        started_at = datetime.now(UTC).isoformat(timespec="seconds")
        cpu_s = time.process_time()
        await _run(config, client, plan_requests(config), note)
        cpu_s = time.process_time() - cpu_s
    finally:
        client.close()
    wall_s = max(record.end_s for record in records) - min(record.start_s for record in records)
    return BenchResult(_public(config), started_at, wall_s, cpu_s, records)


def _refuse_failure(record: BenchRequest) -> None:
    if record.error is not None:
        raise WarmupError(f"warm-up request to {record.target!r} failed: {record.error}")


def _public(config: BenchConfig) -> dict[str, Any]:
    fields = asdict(config)
    del fields["api_key"]
    return fields | {"targets": [target.name for target in config.targets]}


async def _run(config: BenchConfig, client: Client, requests: Iterator[PlannedRequest], note: OnRecord) -> None:
    """Send `requests` when they are due, at most `concurrency` at once, and call `note` with each as it ends.

    `concurrency` tasks take requests from one iterator. So requests are sent in the planned order, and a late request
    of an open loop is sent as soon as a task is free.
    """
    origin_s = time.perf_counter()

    async def send_in_turn() -> None:
        for request in requests:
            if (delay_s := origin_s + request.due_s - time.perf_counter()) > 0:
                await asyncio.sleep(delay_s)
            note(await _ask(config, client, request))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(config.concurrency):
                group.create_task(send_in_turn())
    except* WarmupError as errors:
        raise errors.exceptions[0] from None


async def _ask(config: BenchConfig, client: Client, request: PlannedRequest) -> BenchRequest:
    record = BenchRequest(request.target.name)
    path = "/v1/chat/completions" if config.chat else "/v1/completions"
    record.start_s = time.perf_counter()
    try:
        async with asyncio.timeout(config.timeout_s):
            await client.post(path, request.body, record)
    except TimeoutError:
        record.error = f"no end after {config.timeout_s:g} s"
    except OSError as error:
        record.error = str(error)
    if record.error is None and not record.complete:
        record.error = "the stream ended without [DONE]"
    if record.error is not None:
        record.end_s = time.perf_counter()
    elif record.output_tokens == 0:
        record.output_tokens = len(record.arrivals_s)  # without usage from the server, count one token per chunk
    return record
