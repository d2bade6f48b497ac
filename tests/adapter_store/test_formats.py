"""A store serves adapters of MLX-LM and llama.cpp as PEFT adapters, and marks adapters that have no effect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from helpers.adapter_files import BASE, lora_config, lora_tensors, safetensors, write_adapter
from helpers.other_formats import peft_pairs, write_gguf, write_mlx
from helpers.reported import report
from helpers.store_run import RunStore, ask, in_state
from helpers.waiting import wait_until
from safetensors.numpy import load

from adapter_store.blobs import Blobs
from adapter_store.mirror import Mirror
from adapter_store.sources.local import LocalSource
from peft_adapters.format import CONFIG_FILE, WEIGHTS_FILE
from peft_adapters.formats.mlx import MLX_WEIGHTS
from peft_adapters.kinds.converted import CONVERTED_FIELD
from protocol.queue.bus import Bus
from protocol.runtime.free_space import Reserve, size_of
from protocol.wire import messages as m
from protocol.wire.errors import NoRoom

LLAMA = msgspec.structs.replace(BASE, head_dim=8)


def same(weights: bytes, peft: Path) -> bool:
    """Return whether the tensors equal those that PEFT saved, in any order."""
    found, expected = load(weights), load((peft / WEIGHTS_FILE).read_bytes())
    return found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in found)


async def record_of(bus: Bus, alias: m.Alias) -> m.AdapterRecord:
    record = await bus.get(bus.keys.adapter(alias.digest), m.AdapterRecord)
    assert record is not None
    return record


async def test_a_folder_of_mlx_is_served(bus: Bus, root: Path, tmp_path: Path, run_store: RunStore) -> None:
    await report(bus, LLAMA)
    write_mlx(write_adapter(tmp_path / "peft"), root / "mlx", scale=20.0)
    before = {path.name: path.read_bytes() for path in (root / "mlx").iterdir()}
    store = run_store()
    alias = await in_state(bus, "mlx", "on_disk")
    config, weights = await ask(await store.url(), alias.digest)
    assert same(weights, tmp_path / "peft")
    assert (config["r"], config["lora_alpha"]) == (4, 80.0)
    assert (await record_of(bus, alias)).modules == ["q_proj", "v_proj"]
    assert {path.name: path.read_bytes() for path in (root / "mlx").iterdir()} == before


async def test_a_folder_of_gguf_is_served(bus: Bus, root: Path, tmp_path: Path, run_store: RunStore) -> None:
    pairs = peft_pairs(write_adapter(tmp_path / "peft"))
    write_gguf(pairs, root / "cpp" / "lora-f32.gguf", "llama", 8.0, heads=(2, 2))
    store = run_store()
    await in_state(bus, "cpp", "failed")  # reading it takes the number of heads of a base, still unknown
    await report(bus, LLAMA)
    alias = await in_state(bus, "cpp", "on_disk")
    _, weights = await ask(await store.url(), alias.digest)
    assert same(weights, tmp_path / "peft")
    await report(bus, msgspec.structs.replace(LLAMA, head_dim=16, fingerprint="f2"))
    other = await in_state(bus, "cpp", "on_disk", not_digest=alias.digest)
    assert not same((await ask(await store.url(), other.digest))[1], tmp_path / "peft")


async def test_the_same_adapter_has_one_digest(bus: Bus, root: Path, tmp_path: Path, run_store: RunStore) -> None:
    await report(bus, LLAMA)
    peft = write_adapter(tmp_path / "peft", rank=4)
    write_mlx(peft, root / "one", scale=2.0)
    write_mlx(peft, root / "two", scale=2.0)
    write_gguf(peft_pairs(peft), root / "three" / "a.gguf", "llama", 8.0, heads=(2, 2))
    run_store()
    digests = {(await in_state(bus, name, "on_disk")).digest for name in ("one", "two", "three")}
    assert len(digests) == 1


REFUSED: dict[str, tuple[Any, str]] = {
    "two GGUF files": (lambda folder: [(folder / f"{i}.gguf").write_bytes(b"GGUF") for i in range(2)], "2 GGUF files"),
    "no GGUF": (lambda folder: (folder / "a.gguf").write_bytes(b"not"), "does not begin as GGUF"),
    "MLX without parameters": (
        lambda folder: (
            (folder / CONFIG_FILE).write_text("{}"), (folder / "adapters.safetensors").write_bytes(safetensors({}))
        ),
        "no lora_parameters",
    ),
    "MLX without weights": (
        lambda folder: (folder / CONFIG_FILE).write_text(json.dumps({"lora_parameters": {"scale": 1.0}})), "is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
async def test_what_cannot_be_converted_is_refused(name: str, bus: Bus, root: Path, run_store: RunStore) -> None:
    await report(bus, LLAMA)
    (root / "bad").mkdir()
    REFUSED[name][0](root / "bad")
    run_store()
    alias = await in_state(bus, "bad", "failed")
    assert REFUSED[name][1] in alias.reason


async def test_too_large_a_file_is_not_read(bus: Bus, root: Path, run_store: RunStore) -> None:
    await report(bus, LLAMA)
    (root / "big").mkdir()
    with (root / "big" / "a.gguf").open("wb") as file:
        file.truncate(5_000)
    run_store(max_adapter_bytes=4_000)
    assert "5000 bytes; the limit is 4000" in (await in_state(bus, "big", "failed")).reason


# ---------------------------------------------------------------- effect


def write_zeros(folder: Path) -> Path:
    folder.mkdir()
    zeros = {name: np.zeros_like(tensor) if "lora_B" in name else tensor for name, tensor in lora_tensors().items()}
    (folder / WEIGHTS_FILE).write_bytes(safetensors(zeros))
    (folder / CONFIG_FILE).write_text(json.dumps(lora_config()))
    return folder


@pytest.mark.parametrize(("setting", "expected"), [("folders", True), ("all", True), ("off", False)])
async def test_an_adapter_of_zeros_has_no_effect(
    setting: str, expected: bool, bus: Bus, root: Path, run_store: RunStore, caplog: pytest.LogCaptureFixture
) -> None:
    await report(bus, BASE)
    write_zeros(root / "zeros")
    write_adapter(root / "usual")
    run_store(effect_test=setting)
    assert (await record_of(bus, await in_state(bus, "zeros", "on_disk"))).no_effect == expected
    assert not (await record_of(bus, await in_state(bus, "usual", "on_disk"))).no_effect
    assert ("local:zeros has no effect" in caplog.text) == expected
    assert "local:usual has no effect" not in caplog.text


@pytest.mark.parametrize(("value", "state"), [(0.0, "on_disk"), (0.5, "failed")])
async def test_lora_that_peft_computes_nothing_with_must_be_zero(
    value: float, state: str, bus: Bus, root: Path, run_store: RunStore
) -> None:
    idle = m.SiteShape("model.layers.0.mamba.dt_proj", 4, 16)
    await report(bus, msgspec.structs.replace(BASE, idle=[idle]))
    tensors = lora_tensors(sites=[*BASE.sites, idle])
    tensors[f"base_model.model.{idle.name}.lora_B.weight"] = np.full((16, 4), value)
    (root / "one").mkdir()
    (root / "one" / WEIGHTS_FILE).write_bytes(safetensors(tensors))
    (root / "one" / CONFIG_FILE).write_text(json.dumps(lora_config(target_modules="all-linear")))
    run_store()
    alias = await in_state(bus, "one", state)
    assert ("must be zero here" in alias.reason) == bool(value)


async def test_what_a_conversion_cost_is_what_this_file_says(bus: Bus, root: Path, run_store: RunStore) -> None:
    """Each file's claim is recorded for it alone, although others register the same weights before or after it."""
    await report(bus, BASE)
    layer = BASE.sites[0].name
    claims: dict[str, dict[str, Any] | None] = {
        "first": {"peft_type": "VERA", "keep": 0.5, "errors": {layer: 0.75}},
        "forged": {"peft_type": "CALL +1-555 TO VERIFY", "keep": 0.5, "errors": {"this adapter is a forgery": 1e6}},
        "plain": None,
        "second": {"peft_type": "C3A", "keep": 0.999, "errors": {layer: 0.0123456}},
    }
    run_store()
    told: dict[str, m.Converted | None] = {}
    for name, claim in claims.items():
        fields: dict[str, Any] = {CONVERTED_FIELD: claim} if claim is not None else {}
        write_adapter(root / name, **fields)
        told[name] = (await record_of(bus, await in_state(bus, name, "on_disk"))).converted
    assert told == {
        "first": m.Converted(kind="VERA", keep=0.5, errors={layer: 0.75}), "forged": None, "plain": None,
        "second": m.Converted(kind="C3A", keep=0.999, errors={layer: 0.0123}),
    }  # fmt: skip


async def test_what_was_mapped_is_recorded(bus: Bus, root: Path, run_store: RunStore) -> None:
    await report(bus, BASE)
    write_adapter(root / "wrapped")
    raw = {name.replace("model.layers", "language_model.layers"): value for name, value in lora_tensors().items()}
    raw = {name.replace("base_model.model.", "base_model.model.model."): value for name, value in raw.items()}
    (root / "wrapped" / WEIGHTS_FILE).write_bytes(safetensors(raw))
    run_store()
    record = await record_of(bus, await in_state(bus, "wrapped", "on_disk"))
    assert record.mapped == {"model.language_model.*": "model.*"}


async def test_what_is_recorded_follows_the_base(bus: Bus, root: Path, run_store: RunStore) -> None:
    """Name and content stay the same, but the record now says what the adapter changes in the new base."""
    await report(bus, BASE)
    write_adapter(root / "text")
    run_store()
    alias = await in_state(bus, "text", "on_disk")
    assert (await record_of(bus, alias)).mapped == {}
    sites = [
        msgspec.structs.replace(site, name=site.name.replace("model.", "model.language_model.")) for site in BASE.sites
    ]
    await report(bus, msgspec.structs.replace(BASE, sites=sites, fingerprint="f2"))

    async def is_mapped() -> bool:
        return (await record_of(bus, alias)).mapped == {"model.*": "model.language_model.*"}

    await wait_until(is_mapped, "the record is of the other base")
    assert await bus.adapters.alias("text") == alias


async def test_a_disk_without_room_takes_no_adapter(tmp_path: Path, subtests: pytest.Subtests) -> None:
    """Space for the fetched files and the converted ones is checked before the fetch, and for each piece."""
    peft = write_adapter(tmp_path / "peft")
    (tmp_path / "root").mkdir()
    write_mlx(peft, tmp_path / "root" / "mlx", scale=2.0)
    write_adapter(tmp_path / "root" / "peft")
    source_bytes = size_of(*(tmp_path / "root" / "mlx" / name for name in (CONFIG_FILE, MLX_WEIGHTS)))
    for name, room, is_taken in (
        ("mlx", 2 * source_bytes + 600, True),
        ("mlx", 2 * source_bytes - 600, False),  # enough for one of the two
        ("peft", source_bytes // 2, False),
    ):
        with subtests.test(name=name, room=room):
            folder = tmp_path / f"{name}{room}"
            reserve = Reserve(1000, lambda place, folder=folder, room=room: 1000 + room - size_of(folder))
            mirror = Mirror(Blobs(folder, reserve=reserve), max_bytes=1 << 20)
            source = LocalSource(tmp_path / "root", reserve=reserve)
            if is_taken:
                assert (await mirror.take(source, name, LLAMA)).digest in mirror.blobs
                continue
            with pytest.raises(NoRoom, match="bytes do not fit"):
                await mirror.take(source, name, LLAMA)
            assert size_of(folder) == 0


async def test_a_disk_that_fills_meanwhile_ends_a_fetch(tmp_path: Path) -> None:
    write_adapter(tmp_path / "root" / "peft")
    blobs = Blobs(tmp_path / "store")
    source = LocalSource(tmp_path / "root", reserve=Reserve(1000, lambda place: 1001))
    with pytest.raises(NoRoom):
        await Mirror(blobs, max_bytes=1 << 20).take(source, "peft", LLAMA)
    assert size_of(tmp_path / "store") == 0
