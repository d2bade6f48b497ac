"""Packed weights of a quantized folder are kept, mapped by later starts, and never used for other weights."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from helpers.factories import make_tiny_model
from helpers.mapped import num_mapped
from transformers import PreTrainedModel

from gpu_worker.loading.checkpoint import read_config, read_model
from gpu_worker.quantised.modules import BlockLinear
from gpu_worker.quantised.quantise import quantised_folder
from lora_kernels import cpu

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if not cpu.load():  # the cache also holds the native kernels, which must not be built for each test
        pytest.fail("this machine has no native kernels")
    monkeypatch.setenv("LORAFLEET_CACHE_DIR", str(tmp_path / "cache"))
    base = make_tiny_model(tmp_path / "base")
    return quantised_folder(base, read_config(base), "int4", 1)


def panels(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    found = {name: module.packed for name, module in model.named_modules() if isinstance(module, BlockLinear)}
    assert len(found) > 7
    return {name: packed.panels[0] for name, packed in found.items()}


def read(folder: Path) -> dict[str, torch.Tensor]:
    return panels(read_model(folder, CPU, torch.float32))


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("panels-*"))


def test_the_second_start_maps_what_the_first_has_packed(folder: Path) -> None:
    first = read(folder)
    binary, index = kept(folder)
    assert (binary.suffix, index.suffix) == (".bin", ".json")
    assert not any(num_mapped(binary, tensor.data_ptr()) for tensor in first.values())
    written = binary.stat().st_mtime_ns
    second = read(folder)
    assert all(num_mapped(binary, tensor.data_ptr()) == 1 for tensor in second.values())
    assert all(tensor.data_ptr() % 64 == 0 for tensor in second.values()), "vectors are loaded from whole cache lines"
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())
    assert binary.stat().st_mtime_ns == written


def test_what_cannot_be_read_is_packed_again(folder: Path) -> None:
    first = read(folder)
    binary, index = kept(folder)
    for path, content in ((binary, binary.read_bytes()[:1000]), (index, b"{"), (binary, b"")):
        path.write_bytes(content)
        again = read(folder)
        assert all(torch.equal(first[name], tensor) for name, tensor in again.items())
        assert binary.stat().st_size > 1000


def test_weights_that_changed_are_packed_again(folder: Path) -> None:
    read(folder)
    before = kept(folder)
    os.utime(folder / "weights.bin", ns=(1, 1))
    read(folder)
    assert len(kept(folder)) == 2
    assert kept(folder) != before


def test_a_folder_that_cannot_be_written_is_served(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    gone = folder.rename(folder.with_name("moved"))
    model = read(gone)
    for path in kept(gone):
        path.unlink()
        path.mkdir()  # a folder that no file can replace
        (path / "file").touch()
    again = read(gone)
    assert all(torch.equal(model[name], tensor) for name, tensor in again.items())
    assert "every start packs them" in caplog.text
