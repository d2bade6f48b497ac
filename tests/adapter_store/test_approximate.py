"""Conversion of full-rank kinds by a store: only if enabled, one at a time, tenants in turn, and within limits."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.adapter_files import safetensors
from helpers.reported import report
from helpers.store_run import RunStore, ask, in_state
from msgspec import structs
from oracle.adapters.peft_kinds import LLAMA, Kind, make_adapter, make_base
from peft import C3AConfig

from adapter_store.approximate import KEEP, MAX_TENANT_WAITING, Approximation, ToConvert
from adapter_store.bases import Bases
from adapter_store.blobs import Blobs
from adapter_store.mirror import Mirror
from adapter_store.sources import FLEET
from adapter_store.sources.local import LocalSource
from gpu_worker.describe import describe
from peft_adapters.format import CONFIG_FILE, WEIGHTS_FILE
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import AdapterRefused, BadRequest, Unavailable

BASE_KERNEL = np.zeros((4, 4, 16), np.float32)
C3A = Kind(LLAMA, {"block_size": 16, "init_weights": "gaussian"}, config=C3AConfig)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_base(LLAMA).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def base(model: Path) -> m.ServedModel:
    return describe(str(model))


def c3a(folder: Path, seed: int = 5, **fields: Any) -> Path:
    """Write a C3A adapter with the given config fields."""
    make_adapter(C3A, folder, seed=seed)
    config = folder / CONFIG_FILE
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    return folder


# ---------------------------------------------------------------- a store


async def test_it_is_converted_where_the_store_is_told_to(
    bus: Bus, root: Path, model: Path, base: m.ServedModel, run_store: RunStore
) -> None:
    await report(bus, base)
    c3a(root / "one")
    before = {path.name: path.read_bytes() for path in (root / "one").iterdir()}
    store = run_store(convert_adapters=True, model=str(model))
    one = await in_state(bus, "one", "on_disk")
    record = await bus.get(bus.keys.adapter(one.digest), m.AdapterRecord)
    assert record is not None
    assert record.converted is not None
    assert (record.converted.kind, record.converted.keep) == ("C3A", KEEP)
    limit = (1 - KEEP**2) ** 0.5 + 1e-4
    assert all(0 < error <= limit for error in record.converted.errors.values())
    assert len(record.converted.errors) == 4
    config, weights = await ask(await store.url(), one.digest)
    assert config["peft_type"] == "LORA"
    assert b"lora_A" in weights
    assert {path.name: path.read_bytes() for path in (root / "one").iterdir()} == before


async def test_it_is_refused_where_the_store_is_not_told_to(
    bus: Bus, root: Path, model: Path, base: m.ServedModel, run_store: RunStore
) -> None:
    await report(bus, base)
    c3a(root / "one")
    run_store(model=str(model))
    reason = (await in_state(bus, "one", "failed")).reason
    assert "`lorafleet adapters convert SRC DST --base MODEL --rank auto`" in reason
    assert "--convert-adapters" in reason


async def test_a_store_that_could_not_do_it_does_not_start(
    bus: Bus, model: Path, run_store: RunStore, settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(BadRequest, match="needs the weights of the base"):
        await run_store(convert_adapters=True).task
    blobs = Blobs(tmp_path / "blobs")
    wanted = settings.model_copy(update={"convert_adapters": True, "model": str(model)})
    with pytest.raises(BadRequest, match=r"no_such_library cannot be imported by the store: install"):
        Approximation.of(wanted, blobs, None, ("torch", "no_such_library"))
    assert Approximation.of(settings, blobs, None) is None


# ---------------------------------------------------------------- limits


def converting(tmp_path: Path, model: Path, base: m.ServedModel, **limits: Any) -> tuple[Mirror, LocalSource]:
    """Return a mirror that converts for one base, and a folder source with one C3A adapter."""
    blobs = Blobs(tmp_path / "blobs")
    given: dict[str, Any] = {"timeout_s": 600.0, "max_bytes": 1 << 20} | limits
    approximation = Approximation(blobs, {base.name: str(model)}, bucket=None, **given)
    c3a(tmp_path / "adapters" / "one")
    return Mirror(blobs, max_bytes=1 << 20, approximation=approximation), LocalSource(tmp_path / "adapters", [])


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"timeout_s": 0.05}, "longer than 0.05 s"),
        pytest.param({"max_bytes": 2_000}, "File too large", marks=pytest.mark.thorough),
    ],
)
async def test_a_conversion_that_is_too_large_or_slow_is_ended(
    limits: dict[str, Any], reason: str, tmp_path: Path, model: Path, base: m.ServedModel
) -> None:
    mirror, source = converting(tmp_path, model, base, **limits)
    with pytest.raises(AdapterRefused, match=reason):
        await mirror.converted(lambda: mirror.take(source, "one", base))
    assert list((tmp_path / "blobs" / "staging").iterdir()) == []
    assert len(mirror.blobs) == 0


@pytest.mark.thorough
def test_a_conversion_has_so_much_memory(tmp_path: Path, model: Path) -> None:
    c3a(tmp_path / "one")
    words = [
        str(model),
        str(tmp_path / "one"),
        str(tmp_path / "lora"),
        "0.9",
        "--memory",
        str(1 << 20),
        "--file",
        str(1 << 30),
    ]
    done = subprocess.run([sys.executable, "-m", "gpu_worker.svd_convert", *words], capture_output=True, check=False)
    assert done.returncode != 0
    assert not (tmp_path / "lora").exists()


async def test_one_base_of_several_is_that_which_it_names(
    tmp_path: Path, model: Path, base: m.ServedModel
) -> None:  # fmt: skip
    mirror, source = converting(tmp_path, model, base)
    bases = Bases([base.name, "other"])
    bases.set([base, structs.replace(base, name="other", fingerprint="2")])
    config = tmp_path / "adapters" / "one" / CONFIG_FILE
    for named, found in ((str(model), base.name), ("org/OTHER", "other")):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": named}))
        with pytest.raises(ToConvert) as needed:
            await bases.take(mirror, source, "one", "", FLEET)
        assert needed.value.base.name == found
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "org/stranger"}))
    with pytest.raises(AdapterRefused, match="names none of this fleet: set base_model_name_or_path, or register it"):
        await bases.take(mirror, source, "one", "", FLEET)
    with pytest.raises(ToConvert):
        await bases.take(mirror, source, "one", "other", FLEET)
    with pytest.raises(Unavailable, match="'other' cannot be converted here; this store has tiny"):
        await mirror.converted(lambda: bases.take(mirror, source, "one", "other", FLEET))


async def test_it_waits_for_the_base(tmp_path: Path, model: Path, base: m.ServedModel) -> None:
    mirror, source = converting(tmp_path, model, base)
    with pytest.raises(Unavailable, match="can be converted once a worker has reported its base model"):
        await mirror.take(source, "one", None)


async def test_no_other_kind_is_converted(tmp_path: Path, model: Path, base: m.ServedModel) -> None:
    mirror, source = converting(tmp_path, model, base)
    config = tmp_path / "adapters" / "one" / CONFIG_FILE
    for kind in ("HIRA", "LORA", "VERA", "NO_SUCH", ["C3A"], None):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": kind}))
        with pytest.raises(AdapterRefused):
            await mirror.take(source, "one", base)


@pytest.mark.thorough
async def test_an_adapter_of_another_base_is_refused_with_the_reason(
    tmp_path: Path, model: Path, base: m.ServedModel
) -> None:
    mirror, source = converting(tmp_path, model, base)
    weights = tmp_path / "adapters" / "one" / WEIGHTS_FILE
    weights.write_bytes(safetensors({"base_model.model.no.such.layer.c3a_kernel": BASE_KERNEL}))
    with pytest.raises(AdapterRefused, match=r"tensors that fit nothing: base_model.model.no.such.layer.c3a_kernel"):
        await mirror.converted(lambda: mirror.take(source, "one", base))


async def test_only_so_many_wait(tmp_path: Path, model: Path, base: m.ServedModel) -> None:
    mirror, _ = converting(tmp_path, model, base)
    assert mirror._approximation is not None
    turns = mirror._approximation.turns
    async with turns.held("a"):
        tasks = [asyncio.create_task(turns.take(tenant)) for tenant in "ab" * MAX_TENANT_WAITING]
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="16 per tenant and 64 in all"):
            turns.check("a")
        turns.check("c")
    for task in tasks:
        task.cancel()
