"""Adapters of several bases from real sources: each keeps its base however often and by whatever name it is taken."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import msgspec
import pytest
from helpers.adapter_files import BASE, adapter_bytes, write_adapter
from helpers.hub_stub import HubStub, Repo
from helpers.other_formats import peft_pairs, write_gguf, write_mlx
from helpers.reported import report
from helpers.store_run import RunStore, in_state
from helpers.waiting import wait_until

from adapter_store.bases import Bases
from adapter_store.mirror import Mirror
from adapter_store.sources import FLEET
from adapter_store.sources.hub import HubSource
from adapter_store.sources.local import LocalSource
from peft_adapters.format import CONFIG_FILE
from protocol.queue.bus import Bus, now_ms
from protocol.wire import messages as m
from protocol.wire.errors import AdapterRefused, Unavailable

ONE = msgspec.structs.replace(BASE, head_dim=8)
TWO = msgspec.structs.replace(ONE, name="two", model="two", fingerprint="other")


def wider(factor: int) -> list[m.SiteShape]:
    return [msgspec.structs.replace(site, in_features=site.in_features * factor) for site in BASE.sites]


WIDE = msgspec.structs.replace(ONE, name="wide", model="wide", fingerprint="third", sites=wider(2))


def several(*bases: m.ServedModel, missing: tuple[str, ...] = ()) -> Bases:
    found = Bases([*(base.name for base in bases), *missing])
    found.set(bases)
    return found


@pytest.fixture
def hub(hub: HubStub) -> HubStub:
    hub.repos["org/a"] = Repo()
    return hub


async def test_a_commit_names_its_base_at_every_look(hub: HubStub, source: HubSource, mirror: Mirror) -> None:
    """Once an adapter is stored, its source is not asked again, not even for its files."""
    commit = hub.repos["org/a"].commit(adapter_bytes(base_model_name_or_path="two"))
    unfit = several(ONE, msgspec.structs.replace(WIDE, model="two"))
    for _ in range(3):
        _, name, _ = await several(ONE, TWO).take(mirror, source, f"org/a@{commit}", "", FLEET)
        assert name == "two"
        with pytest.raises(AdapterRefused, match="says the base wide, which it does not fit"):
            await unfit.take(mirror, source, f"org/a@{commit}", "", FLEET)


async def test_many_names_of_one_version_are_taken_together(hub: HubStub, source: HubSource, mirror: Mirror) -> None:
    for seed in range(3):
        hub.repos["org/a"].commit(adapter_bytes(seed, base_model_name_or_path="two"))
        hub.seen.clear()
        takes = [several(ONE, TWO).take(mirror, source, "org/a", "", FLEET, f"t{i}") for i in range(6)]
        assert {name for _, name, _ in await asyncio.gather(*takes)} == {"two"}
        # A `confirm` requests only the head of the file, without a range.
        fetched = [seen.path.rpartition("/")[2] for seen in hub.requests("/resolve/") if seen.range]
        assert fetched.count(CONFIG_FILE) == 1


async def test_what_fits_no_base_is_refused_before_its_weights_come(
    hub: HubStub, source: HubSource, mirror: Mirror
) -> None:
    hub.repos["org/a"].commit(adapter_bytes(sites=wider(3)))
    with pytest.raises(AdapterRefused, match=r"it fits no base of this fleet; tiny: .*; wide: "):
        await several(ONE, WIDE).take(mirror, source, "org/a", "", FLEET)
    assert len(mirror.blobs) == 0
    with pytest.raises(Unavailable, match="of which no worker has started yet"):  # it may belong to the missing base
        await several(ONE, WIDE, missing=("late",)).take(mirror, source, "org/a", "", FLEET)


async def test_gguf_is_of_the_base_that_alone_it_fits(tmp_path: Path, mirror: Mirror) -> None:
    """It names no base, and reading its weights takes one, so each base is tried."""
    (tmp_path / "adapters").mkdir()
    pairs = peft_pairs(write_adapter(tmp_path / "peft"))
    write_gguf(pairs, tmp_path / "adapters" / "cpp" / "a.gguf", "llama", 8.0, heads=(2, 2))
    source = LocalSource(tmp_path / "adapters")
    for bases in (several(WIDE, ONE), several(ONE, WIDE)):
        mirrored, name, record = await bases.take(mirror, source, "cpp", "", FLEET)
        assert (name, mirrored.digest) == (ONE.name, record and record.digest)
    with pytest.raises(AdapterRefused, match=r"fits several bases .*\(tiny, two\).*register it with `base`"):
        await several(ONE, TWO).take(mirror, source, "cpp", "", FLEET)
    _, name, _ = await several(ONE, TWO).take(mirror, source, "cpp", "two", FLEET)
    assert name == "two"
    with pytest.raises(AdapterRefused, match="it fits no base of this fleet; wide: "):
        await several(WIDE, msgspec.structs.replace(WIDE, name="wider")).take(mirror, source, "cpp", "", FLEET)
    with pytest.raises(Unavailable):
        await several(ONE, WIDE, missing=("late",)).take(mirror, source, "cpp", "", FLEET)


async def test_mlx_names_its_base_in_the_config_that_is_converted(tmp_path: Path, mirror: Mirror) -> None:
    (tmp_path / "adapters").mkdir()
    write_mlx(write_adapter(tmp_path / "peft"), tmp_path / "adapters" / "mlx", scale=20.0)
    path = tmp_path / "adapters" / "mlx" / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "two"}))
    _, name, _ = await several(ONE, TWO).take(mirror, LocalSource(tmp_path / "adapters"), "mlx", "", FLEET)
    assert name == "two"


async def register(bus: Bus, base: str = "") -> None:
    await bus.adapters.register(m.Registration(name="a", source="hub:org/a", asked_ms=now_ms(), base=base))


async def test_a_name_stays_served_when_it_does_not_fit_the_base_asked(
    bus: Bus, hub: HubStub, run_store: RunStore
) -> None:
    hub.repos["org/a"].commit(adapter_bytes())
    await report(bus, ONE)
    await bus._redis.hset(bus.keys.bases, "wide", m.encode(WIDE))
    run_store(model=ONE.name, more_models="wide", hub_endpoint=hub.url)
    await register(bus)
    first = await in_state(bus, "a", "on_disk")
    await register(bus, base="wide")

    async def refused() -> m.Alias | None:
        alias = await bus.adapters.alias("a")
        return alias if alias is not None and alias.reason else None

    alias = await wait_until(refused, "the base is refused")
    assert (alias.state, alias.base, alias.digest) == ("on_disk", ONE.name, first.digest)
    assert alias.reason.startswith("not with wide: it is registered for the base wide, which it does not fit")


async def test_what_one_base_served_is_kept_for_no_other_when_there_are_several(
    bus: Bus, hub: HubStub, run_store: RunStore
) -> None:
    """The old entry names no base; while the source is down, the store cannot tell which base of that layout it was."""
    hub.repos["org/a"].commit(adapter_bytes())
    await report(bus, ONE)
    store = run_store(hub_endpoint=hub.url)
    await register(bus)
    assert (await in_state(bus, "a", "on_disk")).base == ""
    await store.end()
    hub.down = True
    await report(bus, TWO)
    await bus._redis.hset(bus.keys.bases, ONE.name, m.encode(ONE))
    run_store(model="two", more_models=ONE.name, hub_endpoint=hub.url, refresh_s=0.1)
    assert (await in_state(bus, "a", "failed")).status == 503
    hub.down = False
    hub.repos["org/a"].commit(adapter_bytes(base_model_name_or_path=ONE.name))
    assert (await in_state(bus, "a", "on_disk")).base == ONE.name
