"""The cost of usage accounting for the queue: its server's CPU time per submission, token and end, with and without.

    python -m benchmarks.fleet.usage_cost

Both kinds alternate on one server, so that other load on the machine affects both alike.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from pathlib import Path

from benchmarks.common import report
from lorafleet.launcher.embedded import start_embedded
from protocol.queue.books.usage import CountedFor, usage_of
from protocol.queue.bus import Bus, StepResult, StepRow, now_ms
from protocol.wire import messages as m

PAIRS, NUM, TOKENS = 40, 128, 20
ONE = (7).to_bytes(4, "little")
COUNTED = CountedFor("acme", "sql", "d" * 64, "tiny", False, 62)
PARTS = ("submission of a call", "token", "end of a request")


async def main() -> None:
    """Measure and print the medians in µs of the server's CPU time."""
    with tempfile.TemporaryDirectory() as folder:
        server = start_embedded(Path(folder) / "queue")
        bus = Bus(server.url)
        try:
            await bus.streams.create(bus.keys.work("w"), 3600)
            found: dict[bool, list[tuple[float, ...]]] = {False: [], True: []}
            for number in range(PAIRS + 3):
                for counts in (True, False) if number % 2 else (False, True):
                    us = await _once(bus, f"{number}-{counts}", counts=counts)
                    if number >= 3:
                        found[counts].append(us)
        finally:
            await bus.close()
            server.stop()
    rows: list[list[str]] = []
    for place, part in enumerate(PARTS):
        off, on = ([us[place] for us in found[counts]] for counts in (False, True))
        gained = statistics.median(b - a for a, b in zip(off, on, strict=True))
        rows.append([part, f"{statistics.median(off):.2f}", f"{statistics.median(on):.2f}", f"{gained:+.2f}"])
    print(report.table(["µs of the queue's CPU", "not counted", "counted", "difference, by pairs"], rows))


async def _once(bus: Bus, name: str, *, counts: bool) -> tuple[float, ...]:
    """Run `NUM` requests of one worker at once; return µs per request for each of PARTS, for tokens per token."""
    rids = [f"{name}-{i}" for i in range(NUM)]
    usage = usage_of(COUNTED, calls=1, prompt_tokens=64, has_output=True)
    body = m.Body(prompt=ONE * 64, sampling=m.Sampling(), max_new_tokens=64)
    begin = await _cpu_us(bus)
    for rid in rids:
        submit = m.RequestHead(rid, "acme", "interactive", "d" * 64, 64, 64, now_ms() + 60_000, "g")
        await bus.submit("interactive", [(submit, body)], max_queued=1 << 20, usages=[usage] if counts else ())
    submitted = await _cpu_us(bus)
    await bus.assign("w", [(m.Assigned(rid, 1, ""), 0) for rid in rids])
    await bus.step("w", StepResult(rows=[StepRow(rid, 1, 0, ONE) for rid in rids]))
    first = await _cpu_us(bus)
    for place in range(1, TOKENS):
        await bus.step("w", StepResult(rows=[StepRow(rid, 1, place, ONE) for rid in rids]))
    made = await _cpu_us(bus)
    ends = [StepRow(rid, 1, TOKENS, ONE, state="completed", finish="stop") for rid in rids]
    refused = await bus.step("w", StepResult(rows=ends))
    assert not refused, refused
    ended = await _cpu_us(bus)
    return (submitted - begin) / NUM, (made - first) / NUM / (TOKENS - 1), (ended - made) / NUM


async def _cpu_us(bus: Bus) -> float:
    return 1e6 * (await bus.server.facts()).cpu_s


if __name__ == "__main__":
    asyncio.run(main())
