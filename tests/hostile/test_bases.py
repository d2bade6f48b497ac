"""Attacks on a fleet of several bases: adapters that lie about their base, names claimed by others, floods."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from helpers.adapter_files import BASE as ONE
from helpers.adapter_files import write_adapter
from helpers.reported import report
from helpers.scripted_fleet import ScriptedFleet, make_model_folder, running_gateway
from helpers.waiting import wait_until
from httpx2 import AsyncClient
from tokenizers import Tokenizer

from adapter_store.bases import Bases
from adapter_store.blobs import MAX_BASE_NAME, Blobs
from adapter_store.mirror import Mirror
from adapter_store.sources import FLEET
from adapter_store.sources.local import LocalSource
from protocol.queue.bus import Bus, now_ms
from protocol.wire import messages as m
from protocol.wire.errors import AdapterRefused
from scheduler.config import SchedulerConfig
from scheduler.core import Scheduler
from tests.scheduler.fakes import make_submit

TWO = msgspec.structs.replace(ONE, name="two", model="/models/two", fingerprint="other")
OTHER = msgspec.structs.replace(
    ONE, name="other", model="org/other", fingerprint="third",
    sites=[msgspec.structs.replace(site, in_features=site.in_features * 2) for site in ONE.sites],
)  # fmt: skip
NAMES = [ONE.name, "two", "other"]


@pytest.mark.parametrize(
    "lie",
    [
        "two\nanyone", "two\0", "\x1b[31mtwo", "two\u202e", ["two"], {"two": 1}, 2, True, None, "", " ", "/", "..",
        "../" * 90 + "two", "t" * (MAX_BASE_NAME + 1), "base anyone",
    ],
)  # fmt: skip
async def test_what_an_adapter_calls_its_base_is_a_name_and_nothing_else(tmp_path: Path, lie: Any) -> None:
    """It opens no path, and adds no line to the store's records: a reader there would open a private version to all."""
    write_adapter(tmp_path / "adapters" / "x", base_model_name_or_path=lie)
    blobs, source = Blobs(tmp_path / "blobs"), LocalSource(tmp_path / "adapters")
    mirror, bases = Mirror(blobs, max_bytes=1 << 20), Bases(NAMES)
    bases.set([ONE, OTHER], ["two"])
    if isinstance(lie, str) and lie.endswith("/two"):
        bases.set([ONE, TWO, OTHER])
        mirrored, name, _ = await bases.take(mirror, source, "x", "", FLEET)
        assert name == "two"  # it is a path that ends in a base's name
    else:
        mirrored, name, _ = await bases.take(mirror, source, "x", "", FLEET)
        assert name == ONE.name  # found by its shapes
    readers = blobs.readers_of(mirrored.version.key)
    named = blobs.named_base(mirrored.version.key)
    assert named.isprintable()
    assert len(named) <= MAX_BASE_NAME
    again, same, _ = await bases.take(mirror, source, "x", "", FLEET)
    assert (again, same, blobs.readers_of(mirrored.version.key)) == (mirrored, name, readers)


async def test_one_content_under_two_lies_has_a_base_for_each_name(tmp_path: Path) -> None:
    """Contents that differ only in their base's name share a blob, but each name keeps its own base."""
    for name, base in (("a", ONE.name), ("b", "two"), ("c", "other"), ("d", "")):
        write_adapter(tmp_path / "adapters" / name, base_model_name_or_path=base)
    mirror, source, bases = (
        Mirror(Blobs(tmp_path / "blobs"), max_bytes=1 << 20),
        LocalSource(tmp_path / "adapters"),
        Bases(NAMES),
    )
    bases.set([ONE, TWO, OTHER])
    found = [(await bases.take(mirror, source, name, "", FLEET))[:2] for name in "ab"]
    assert [base for _, base in found] == [ONE.name, "two"]
    assert len({mirrored.digest for mirrored, _ in found}) == 1
    with pytest.raises(AdapterRefused, match="says the base other, which it does not fit"):
        await bases.take(mirror, source, "c", "", FLEET)
    with pytest.raises(AdapterRefused, match=f"several bases of this fleet \\({ONE.name}, two\\)"):
        await bases.take(mirror, source, "d", "", FLEET)


@pytest_asyncio.fixture
async def fleet(bus: Bus, tmp_path: Path) -> AsyncIterator[ScriptedFleet]:
    folders = [make_model_folder(tmp_path / name) for name in ("a", "b")]
    bases = [msgspec.structs.replace(ONE, name=name, max_model_len=256, vocab_size=300) for name in ("a", "b")]
    await report(bus, bases[0])
    await bus._redis.hset(bus.keys.bases, "b", m.encode(bases[1]))
    loads = {"a": m.BaseLoad(1), "b": m.BaseLoad(1)}
    status = m.SchedulerStatus(queued=0, running=0, workers=2, drain_rate=0.0, sent_ms=now_ms(), bases=loads)
    await bus.set(bus.keys.status, status, 3_600_000)
    yield ScriptedFleet(bus, Tokenizer.from_file(str(folders[0] / "tokenizer.json")))


async def test_a_strangers_adapter_takes_no_bases_name(bus: Bus, fleet: ScriptedFleet, tmp_path: Path) -> None:
    for number, name in enumerate(("b", "a", "base", "b:b", "b:", ":b", "a:b", "b:a:x")):
        digest = f"{number}" * 64
        alias = m.Alias(name=name, state="on_disk", digest=digest, source="local:x", base="a", created_ms=1)
        record = m.AdapterRecord(
            digest=digest, rank=1, num_bytes=1, config={}, modules=[], source="local:x", created_ms=1
        )
        await bus.adapters.publish([(alias, record)])
    async with (
        running_gateway(bus, tmp_path / "a", more_models=str(tmp_path / "b"), request_sources="hub,s3") as gateway,
        AsyncClient(base_url=gateway.url, timeout=30) as http,
    ):
        for name, parent in (("b", None), ("a", None), ("base", None)):
            assert (await http.get(f"/v1/models/{name}")).json()["parent"] == parent
        for name in ("b:b", "b:", "b:a:x", "b:..", "b:/etc/passwd", "b:b:b", "B", " b", "b "):
            body = {"model": name, "prompt": "x", "max_tokens": 1}
            answer = await http.post("/v1/completions", json=body)
            assert answer.status_code == 404, (name, answer.text)
        assert fleet.seen == []
        long = await http.post("/v1/completions", json={"model": "b:" + "x" * 100_000, "prompt": "x"})
        assert 400 <= long.status_code < 500
        assert len(long.content) < 2_000


async def test_why_a_base_has_not_started_is_told_to_operators_alone(
    bus: Bus, fleet: ScriptedFleet, tmp_path: Path
) -> None:
    """It may contain paths of a machine. Tenants only learn that the base's calls fail, others that the base does."""
    await bus.members.note_failure("b", "/srv/private/b has no config.json")
    loads = {"a": m.BaseLoad(1), "b": m.BaseLoad()}
    status = m.SchedulerStatus(queued=0, running=0, workers=1, drain_rate=0.0, sent_ms=now_ms(), bases=loads)
    await bus.set(bus.keys.status, status, 3_600_000)
    secrets = {scope: (await bus.api_keys.create("acme", [scope]))[0] for scope in ("infer", "adapters", "admin")}
    heads = [{"authorization": f"Bearer {secret}"} for secret in secrets.values()]
    for is_open in (False, True):
        async with (
            running_gateway(
                bus, tmp_path / "a", more_models=str(tmp_path / "b"), api_keys=True, open_pages=is_open
            ) as gateway,
            AsyncClient(base_url=gateway.url, timeout=30) as http,
        ):

            async def is_told(http: AsyncClient = http) -> bool:
                body = {"model": "b", "prompt": "x"}
                answer = await http.post("/v1/completions", json=body, headers=heads[0])
                assert "private" not in answer.text
                return answer.status_code == 503 and answer.json()["error"]["code"] == "base_failed"

            await wait_until(is_told, "the gateway has seen that the base fails")
            for path in ("/v1/fleet", "/health", "/metrics", "/v1/models", "/v1/models/b", "/info", "/api/ps"):
                for head in ({}, *heads[:2]):
                    answer = await http.get(path, headers=head)
                    assert "private" not in answer.text, (path, head, is_open)
            page = await http.get("/v1/fleet", headers=heads[2])
            shown = "" if is_open else "/srv/private/b has no config.json"  # an open page ignores keys
            assert page.json()["failed"] == {"b": shown}


def test_floods_for_each_base_starve_no_tenant_of_any() -> None:
    """A flooder and a victim for each of many bases, some without workers: each victim gets the next free slot."""
    names = [f"base {i}" for i in range(12)]
    workers = {
        name: m.WorkerBeat(wid=f"w{i}", name=f"w{i}", base=name, capacity=2, sent_ms=1)
        for i, name in enumerate(names)
        if i % 4
    }
    scheduler = Scheduler(SchedulerConfig())
    scheduler.set_bases(names)
    scheduler.beats({beat.wid: beat for beat in workers.values()}, 0.0)
    for name in names:
        for i in range(300):
            digest = f"d{i % 40}" if i % 2 else ""
            scheduler.submit(make_submit(f"{name} flood {i}", base=name, tenant=f"flood {name}", digest=digest), 0)
    running: dict[str, list[str]] = {}

    def step() -> set[str]:
        found: set[str] = set()
        for wid, batch in scheduler.plan(0.0).batches.items():
            running.setdefault(wid, []).extend(request.rid for request in batch)
            found |= {request.rid for request in batch}
            assert all(request.submit.base == scheduler.workers.by_id[wid].beat.base for request in batch)
        return found

    step()
    for name in names:
        scheduler.submit(make_submit(f"{name} victim", base=name, tenant=f"victim {name}"), 0)
    waiting = {f"{name} victim" for name in workers}
    for _ in range(6):  # a worker holds at most four; each end frees a slot
        for wid, rids in running.items():
            if rids:
                scheduler.ended(m.Ended(rids.pop(0), wid, 1, 1))
        waiting -= step()
    assert not waiting
