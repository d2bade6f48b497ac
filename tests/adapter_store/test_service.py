"""A complete store on a real queue and a real folder: what it serves and refuses, also after changes and crashes."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from helpers.adapter_files import BASE, lora_config, lora_tensors, safetensors, write_adapter
from helpers.reported import report
from helpers.store_run import RunStore, ask, get, in_state
from helpers.waiting import wait_until

from adapter_store.service import reachable, serve
from adapter_store.timings import StoreTimings
from peft_adapters.format import CONFIG_FILE, WEIGHTS_FILE
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import BadRequest

# ---------------------------------------------------------------- what is served


async def test_serves_a_folder_as_an_adapter(bus: Bus, root: Path, run_store: RunStore) -> None:
    await report(bus, BASE)
    write_adapter(root / "one", seed=1)
    store = run_store()
    alias = await in_state(bus, "one", "on_disk")
    assert alias.source == "local:one"
    record = await bus.get(bus.keys.adapter(alias.digest), m.AdapterRecord)
    assert record is not None
    assert (record.rank, record.modules, record.source) == (4, ["q_proj", "v_proj"], "local:one")
    assert record.num_bytes == (root / "one" / WEIGHTS_FILE).stat().st_size
    config, weights = await ask(await store.url(), alias.digest)
    assert config == record.config
    assert weights == (root / "one" / WEIGHTS_FILE).read_bytes()


async def test_follows_the_folder(bus: Bus, root: Path, run_store: RunStore) -> None:
    """Without a restart: an adapter that is added, a nested one, a changed one and a removed one."""
    await report(bus, BASE)
    store = run_store()
    url = await store.url()
    write_adapter(root / "org" / "late", seed=1)
    first = await in_state(bus, "org/late", "on_disk")
    write_adapter(root / "org" / "late", seed=2, rank=8)
    second = await in_state(bus, "org/late", "on_disk", not_digest=first.digest)
    assert second.created_ms == first.created_ms
    for alias in (first, second):
        await ask(url, alias.digest)
    shutil.rmtree(root / "org" / "late")

    async def is_gone() -> bool:
        return await bus.adapters.alias("org/late") is None

    await wait_until(is_gone, "the name is removed")
    await ask(url, second.digest)
    kinds = [m_event.kind for m_event in await events(bus)]
    assert kinds == ["alias", "alias", "removed"]


async def events(bus: Bus) -> list[m.AdapterEvent]:
    entries = await bus.streams.entries(bus.keys.adapter_events)
    return [msgspec.msgpack.decode(fields[b"b"], type=m.AdapterEvent) for _, fields in entries]


async def test_nothing_is_on_disk_before_the_base_is_known(bus: Bus, root: Path, run_store: RunStore) -> None:
    write_adapter(root / "good")
    write_adapter(root / "wide")
    (root / "wide" / WEIGHTS_FILE).write_bytes(
        safetensors(lora_tensors(sites=[m.SiteShape(site.name, 32, 16) for site in BASE.sites]))
    )
    store = run_store()
    await in_state(bus, "good", "downloading")
    await in_state(bus, "wide", "downloading")

    async def both_are_staged() -> bool:
        return (await get(f"{await store.url()}/health")).json()["num_blobs"] == 2

    await wait_until(both_are_staged, "both were found well formed")
    assert {alias.state for alias in await bus.adapters.aliases()} == {"downloading"}
    await report(bus, BASE)
    good = await in_state(bus, "good", "on_disk")
    wide = await in_state(bus, "wide", "failed")
    assert "[4, 16]" in wide.reason
    other = msgspec.structs.replace(BASE, fingerprint="f2", sites=[m.SiteShape("lm_head", 16, 64)])
    await report(bus, other)
    assert "does not have" in (await in_state(bus, "good", "failed")).reason
    await report(bus, BASE)
    assert (await in_state(bus, "good", "on_disk")).digest == good.digest


# ---------------------------------------------------------------- what is refused


def drop(prefix: str) -> bytes:
    return safetensors({name: tensor for name, tensor in lora_tensors().items() if prefix not in name})


def overlap() -> bytes:
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    return safetensors(lora_tensors(), **{name: {"dtype": "F32", "shape": [16, 4], "data_offsets": [0, 256]}})


GOOD = safetensors(lora_tensors())
BAD: dict[str, tuple[dict[str, Any] | bytes | None, bytes | None, str]] = {
    "no-weights": (lora_config(), None, "adapter_model.safetensors is missing"),
    "empty": (lora_config(), b"", "too short"),
    "half": (lora_config(), GOOD[: len(GOOD) // 2], "bytes where its header describes"),
    "header-cut": (lora_config(), GOOD[:40], "is cut"),
    "overlap": (lora_config(), overlap(), "overlaps"),
    "size-bomb": (lora_config(), (1 << 63).to_bytes(8, "little") + b"{}", "the limit is"),
    "missing-tensors": (lora_config(), drop("layers.1.self_attn.q_proj.lora_A"), "missing"),
    "c3a": (lora_config(peft_type="C3A"), GOOD, "C3A"),
    "rank-0": (lora_config(r=0), GOOD, "rank 0"),
    "qalora": (lora_config(use_qalora=True), GOOD, "use_qalora"),
    "no-json": (b"{", GOOD, "not valid JSON"),
    "extra": (lora_config(), safetensors({**lora_tensors(), "lm_head.weight": np.zeros((2, 2))}), "lm_head.weight"),
    "wrong-base": (lora_config(), safetensors(lora_tensors(sites=[m.SiteShape("h.0.q_proj", 8, 8)])), "does not have"),
}


def write_bad(folder: Path, config: dict[str, Any] | bytes | None, weights: bytes | None) -> None:
    folder.mkdir()
    if weights is not None:
        (folder / WEIGHTS_FILE).write_bytes(weights)
    if config is not None:
        (folder / CONFIG_FILE).write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())


async def test_bad_adapters_say_why_and_disturb_nobody(bus: Bus, root: Path, run_store: RunStore) -> None:
    """All bad folders lie beside a good one; each is served once its files are corrected."""
    await report(bus, BASE)
    for name, (config, weights, _) in BAD.items():
        write_bad(root / name, config, weights)
    write_adapter(root / "good", seed=100)
    store = run_store()
    for name, (_, _, part) in BAD.items():
        alias = await in_state(bus, name, "failed")
        assert part in alias.reason, alias
        assert alias.digest == ""
        assert str(root) not in alias.reason
    good = await in_state(bus, "good", "on_disk")
    await ask(await store.url(), good.digest)
    for seed, name in enumerate(BAD):
        write_adapter(root / name, seed=seed)
    for name in BAD:
        await in_state(bus, name, "on_disk")
    assert await bus.adapters.alias("good") == good


async def test_a_good_one_gone_bad_is_not_served_on(bus: Bus, root: Path, run_store: RunStore) -> None:
    await report(bus, BASE)
    write_adapter(root / "a")
    run_store()
    await in_state(bus, "a", "on_disk")
    (root / "a" / WEIGHTS_FILE).write_bytes(GOOD[:-1])
    assert (await in_state(bus, "a", "failed")).digest == ""


async def test_pickles_are_refused_without_being_opened(bus: Bus, root: Path, run_store: RunStore) -> None:
    """The pickle is a pipe without a writer, so opening it would block."""
    (root / "old").mkdir()
    (root / "old" / CONFIG_FILE).write_text(json.dumps(lora_config()))
    os.mkfifo(root / "old" / "adapter_model.bin")
    (root / "pipe").mkdir()
    (root / "pipe" / CONFIG_FILE).write_text(json.dumps(lora_config()))
    os.mkfifo(root / "pipe" / WEIGHTS_FILE)
    run_store()
    assert "adapter_model.bin is a pickle" in (await in_state(bus, "old", "failed")).reason
    assert "not a regular file" in (await in_state(bus, "pipe", "failed")).reason


async def test_files_that_are_too_large_are_refused_unread(
    bus: Bus, root: Path, settings: Settings, run_store: RunStore
) -> None:
    """Sparse files of zeros: the store would otherwise read or copy gigabytes."""
    await report(bus, BASE)
    for file, num_bytes in ((CONFIG_FILE, 1536 << 20), ("tokenizer.json", 4 << 30), (WEIGHTS_FILE, 9 << 30)):
        with (write_adapter(root / file.partition(".")[0]) / file).open("ab") as sparse:
            sparse.truncate(num_bytes)
    store = run_store()
    for file, num_bytes in ((CONFIG_FILE, 1536 << 20), ("tokenizer.json", 4 << 30), (WEIGHTS_FILE, 9 << 30)):
        alias = await in_state(bus, file.partition(".")[0], "failed")
        assert f"{file} has {num_bytes} bytes; the limit is" in alias.reason
    await store.end()
    assert not list((settings.data / "adapters" / "staging").iterdir()), "nothing was copied"


async def test_nothing_leaves_the_root(bus: Bus, root: Path, tmp_path: Path, run_store: RunStore) -> None:
    """Links within the root are followed; links out of it are refused, for a folder, a file or a parent."""
    await report(bus, BASE)
    outside = write_adapter(tmp_path / "outside" / "secret")
    inside = write_adapter(root / "real")
    (root / "alias").symlink_to(inside)
    (root / "folder").symlink_to(outside)
    (root / "parent").symlink_to(outside.parent)
    (root / "file").mkdir()
    shutil.copy(outside / CONFIG_FILE, root / "file")
    (root / "file" / WEIGHTS_FILE).symlink_to(outside / WEIGHTS_FILE)
    (root / "linked").mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (root / "linked" / name).symlink_to(inside / name)
    run_store()
    for name in ("real", "alias", "linked"):
        await in_state(bus, name, "on_disk")
    for name in ("folder", "file", "parent"):
        assert "leaves the adapter root" in (await in_state(bus, name, "failed")).reason
    assert await bus.adapters.alias("parent/secret") is None


@pytest.mark.parametrize("name", ["../x", "/etc", "a/../b", "a/b/c", "a\x00b", ".hidden", "a//b", "", "é", "a" * 97])
async def test_names_that_are_none_are_not_looked_up(root: Path, name: str) -> None:
    from adapter_store.sources.local import LocalSource
    from protocol.wire.errors import NotFound

    with pytest.raises(NotFound):
        await LocalSource(root).resolve(name)


async def test_badly_named_folders_are_told_once(
    bus: Bus, root: Path, run_store: RunStore, caplog: pytest.LogCaptureFixture
) -> None:
    await report(bus, BASE)
    write_adapter(root / "not a name")
    write_adapter(root / "good")
    run_store()
    await in_state(bus, "good", "on_disk")
    write_adapter(root / "better", seed=2)
    await in_state(bus, "better", "on_disk")
    assert {alias.name for alias in await bus.adapters.aliases()} == {"good", "better"}
    assert len([record for record in caplog.records if "not a name" in record.getMessage()]) == 1


async def test_a_folder_being_written_is_not_served(bus: Bus, root: Path, run_store: RunStore) -> None:
    """Written in twenty pieces, each seen by a scan: the only states are "downloading" and, at the end, complete."""
    await report(bus, BASE)
    write_adapter(root / "other")
    run_store(scan_interval_s=0.02)
    (root / "slow").mkdir()
    (root / "slow" / CONFIG_FILE).write_text(json.dumps(lora_config()))
    pieces = [GOOD[i : i + len(GOOD) // 20] for i in range(0, len(GOOD), len(GOOD) // 20)]
    with (root / "slow" / WEIGHTS_FILE).open("wb", buffering=0) as file:
        for seed, piece in enumerate(pieces):
            file.write(piece)
            other = await bus.adapters.alias("other")
            write_adapter(root / "other", seed=seed)
            await in_state(bus, "other", "on_disk", not_digest=other.digest if other else "")
            alias = await bus.adapters.alias("slow")
            assert alias is None or alias.state != "on_disk" or piece is pieces[-1]
    await in_state(bus, "slow", "on_disk")


# ---------------------------------------------------------------- what goes wrong


async def test_a_restart_keeps_all_and_notices_what_happened_meanwhile(
    bus: Bus, root: Path, settings: Settings, run_store: RunStore
) -> None:
    await report(bus, BASE)
    for seed, name in enumerate(("same", "changed", "removed")):
        write_adapter(root / name, seed=seed)
    store = run_store()
    before = {name: await in_state(bus, name, "on_disk") for name in ("same", "changed", "removed")}
    await store.end()
    assert await bus.members.ids(bus.keys.stores) == []
    blob = settings.data / "adapters" / "blobs" / before["same"].digest / WEIGHTS_FILE
    written = blob.stat()
    shutil.rmtree(root / "removed")
    write_adapter(root / "changed", seed=9)
    again = run_store()
    await in_state(bus, "changed", "on_disk", not_digest=before["changed"].digest)

    async def is_gone() -> bool:
        return await bus.adapters.alias("removed") is None

    await wait_until(is_gone, "the name is removed")
    assert await bus.adapters.alias("same") == before["same"]
    assert (blob.stat().st_ino, blob.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    await ask(await again.url(), before["same"].digest)


async def test_a_lost_catalogue_is_published_again(bus: Bus, root: Path, run_store: RunStore) -> None:
    await report(bus, BASE)
    write_adapter(root / "a")
    run_store()
    alias = await in_state(bus, "a", "on_disk")
    await bus._redis.flushall()
    assert await in_state(bus, "a", "on_disk") == alias
    assert await bus.get(bus.keys.adapter(alias.digest), m.AdapterRecord) is not None


async def test_a_lost_mount_takes_nothing_away(bus: Bus, root: Path, run_store: RunStore) -> None:
    await report(bus, BASE)
    write_adapter(root / "a")
    store = run_store()
    alias = await in_state(bus, "a", "on_disk")
    os.rename(root, root.with_name("elsewhere"))
    url = await store.url()
    await ask(url, alias.digest)
    os.rename(root.with_name("elsewhere"), root)
    write_adapter(root / "b", seed=2)
    await in_state(bus, "b", "on_disk")
    assert await bus.adapters.alias("a") == alias


@pytest.mark.parametrize("damage", ["flip", "remove"])
async def test_damaged_blobs_are_fetched_again(
    bus: Bus, root: Path, settings: Settings, run_store: RunStore, damage: str
) -> None:
    await report(bus, BASE)
    write_adapter(root / "a")
    alias_before = run_store()
    alias = await in_state(bus, "a", "on_disk")
    await alias_before.end()
    blob = settings.data / "adapters" / "blobs" / alias.digest
    if damage == "flip":
        raw = (blob / WEIGHTS_FILE).read_bytes()
        (blob / WEIGHTS_FILE).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    else:
        shutil.rmtree(blob)
    url = await run_store().url()
    await ask(url, alias.digest)


async def test_more_adapters_than_disk(bus: Bus, root: Path, run_store: RunStore) -> None:
    """Ten adapters, space for three: each can be requested at any time, repeatedly."""
    await report(bus, BASE)
    size = (write_adapter(root / "a0") / WEIGHTS_FILE).stat().st_size + 300
    for seed in range(10):
        write_adapter(root / f"a{seed}", seed=seed)
    store = run_store(store_quota_bytes=3 * size)
    digests = [(await in_state(bus, f"a{seed}", "on_disk")).digest for seed in range(10)]
    for digest in [*digests, *digests]:
        await ask(await store.url(), digest)
    assert (await get(f"{await store.url()}/health")).json()["num_bytes"] <= 3 * size


async def test_records_go_with_their_last_name(
    bus: Bus, root: Path, run_store: RunStore, timings: StoreTimings
) -> None:
    """Also records of an earlier process; a record that still has a name stays."""
    timings.record_kept_s = 0.0
    await report(bus, BASE)
    stale = m.AdapterRecord(digest="0" * 64, rank=1, num_bytes=1, config={}, modules=[], source="local:x", created_ms=1)
    await bus.set(bus.keys.adapter(stale.digest), stale)
    for name, seed in (("a", 1), ("twin", 1), ("b", 2)):
        write_adapter(root / name, seed=seed)
    run_store()
    a, b = [await in_state(bus, name, "on_disk") for name in ("a", "b")]
    await in_state(bus, "twin", "on_disk")

    async def only(*digests: str) -> bool:
        found = {key.decode() async for key in bus._redis.scan_iter(match=bus.keys.adapter("*"))}
        return found == {bus.keys.adapter(digest) for digest in digests}

    await wait_until(lambda: only(a.digest, b.digest), "the stale one is gone")
    shutil.rmtree(root / "a")
    shutil.rmtree(root / "b")
    await wait_until(lambda: only(a.digest), "the record without a name is gone")
    write_adapter(root / "twin", seed=3)
    twin = await in_state(bus, "twin", "on_disk", not_digest=a.digest)
    await wait_until(lambda: only(twin.digest), "a name that points elsewhere leaves none behind")


async def test_a_store_that_others_can_reach_needs_a_secret(bus: Bus, settings: Settings) -> None:
    with pytest.raises(BadRequest, match="secret"):
        await serve(settings.model_copy(update={"store_host": "0.0.0.0"}), asyncio.Event())


def test_a_store_is_reached_where_it_reaches_the_queue() -> None:
    own = socket.gethostbyname(socket.gethostname())
    assert reachable("192.0.2.7", "redis://queue:6379/0") == "192.0.2.7"
    assert reachable("::1", "unix:///tmp/queue.sock") == "[::1]"
    assert reachable("0.0.0.0", "unix:///tmp/queue.sock") == own
    assert reachable("0.0.0.0", "redis://127.0.0.1:6379/0") == own  # other hosts cannot reach a loopback
    assert reachable("", f"rediss://store@{own}:6379/0") == own
    assert reachable("0.0.0.0", "redis://no-such-host.invalid/0") == own
