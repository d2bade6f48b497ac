"""A queue with one gateway and one worker, for tests of its Lua scripts."""

from __future__ import annotations

import msgspec
import numpy as np

from protocol.queue.bus import Bus, Refused, StepResult, StepRow, decode, now_ms
from protocol.wire import messages as m

GATEWAY = "g"
DEADLINE_MS = 3_600_000


def make_submit(rid: str, **more: object) -> m.RequestHead:
    plain = m.RequestHead(
        rid=rid, tenant="t", cls="interactive", digest="", gateway=GATEWAY, num_prompt_tokens=3, max_new_tokens=8,
        deadline_ms=now_ms() + DEADLINE_MS,
    )  # fmt: skip
    return msgspec.structs.replace(plain, **more)


def make_body() -> m.Body:
    return m.Body(prompt=b"\1\0\0\0" * 3, sampling=m.Sampling(), max_new_tokens=8)


def make_job(jid: str, *rids: str, key: str = "") -> m.Job:
    return m.Job(
        jid=jid, endpoint="/x", tenant="acme", model="b", created_ms=1, expires_ms=2, rids=list(rids), key=key
    )  # fmt: skip


def ids(*tokens: int) -> bytes:
    return np.array(tokens, dtype="<i4").tobytes()


class Queue:
    """A bus with a gateway and a worker, and queries that tests need."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.keys = bus.keys

    async def submit(self, *rids: str, max_queued: int = 100, **more: object) -> tuple[str, object]:
        pairs = [(make_submit(rid, **more), make_body()) for rid in rids]
        return await self.bus.submit("interactive", pairs, max_queued=max_queued)

    async def assign(self, *rids: str, wid: str = "w", epoch: int = 0, leader: str = "") -> tuple[str, list[str]]:
        return await self.bus.assign(wid, [(m.Assigned(rid, epoch + 1, ""), epoch) for rid in rids], leader=leader)

    async def running(self, *rids: str) -> None:
        await self.submit(*rids)
        assert (await self.assign(*rids))[0] == "ok"

    async def write(self, *rows: StepRow) -> list[Refused]:
        """Write a step of worker `w`; return the refused rows."""
        return await self.bus.step("w", StepResult(rows=list(rows)))

    async def requeue(self, *rids: str, counts: bool = True, wid: str = "w") -> dict[str, str]:
        return await self.bus.requeue(wid, rids, counts=counts, max_attempts=3, name='gpu "0"\n')

    async def fields(self, rid: str) -> dict[str, str]:
        found = await self.bus._redis.hgetall(self.keys.req(rid))
        return {name.decode(): value.decode(errors="replace") for name, value in found.items()}

    async def log(self, rid: str) -> bytes:
        return await self.bus._redis.get(self.keys.tok(rid)) or b""

    async def queued(self) -> list[tuple[str, int]]:
        entries = await self.bus.streams.entries(self.keys.sub("interactive"))
        return [(decode(fields[b"b"], m.RequestHead).rid, int(fields[b"e"])) for _, fields in entries]

    async def submitted(self) -> list[m.RequestHead]:
        entries = await self.bus.streams.entries(self.keys.sub("interactive"))
        return [decode(fields[b"b"], m.RequestHead) for _, fields in entries]

    async def deltas(self) -> list[m.Delta]:
        entries = await self.bus.streams.entries(self.keys.out(GATEWAY))
        return [delta for _, fields in entries for delta in decode(fields[b"b"], list[m.Delta])]

    async def ended(self) -> list[m.Ended]:
        entries = await self.bus.streams.entries(self.keys.ended)
        return [item for _, fields in entries for item in decode(fields[b"b"], list[m.Ended])]

    async def orders(self, wid: str = "w") -> list[m.Control]:
        return [decode(fields[b"b"], m.Control) for _, fields in await self.bus.streams.entries(self.keys.ctl(wid))]

    async def work(self, wid: str = "w") -> list[bytes]:
        return [entry for entry, _ in await self.bus.streams.entries(self.keys.work(wid))]

    async def ttl_s(self, key: str) -> float:
        return await self.bus._redis.pttl(key) / 1000


def row(rid: str, seq0: int, *tokens: int, epoch: int = 1, finish: str = "", logprobs: bytes = b"") -> StepRow:
    state = {"": "", "cancelled": "cancelled", "error": "failed"}.get(finish, "completed")
    return StepRow(rid, epoch, seq0, ids(*tokens), logprobs, state=state, finish=finish)
