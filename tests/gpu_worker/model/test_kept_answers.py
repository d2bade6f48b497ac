"""An untouched model's logits are kept for later starts, used only for that model, and compared with the engine's."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.factories import make_tiny_model
from oracle.tiny_models import tiny_model
from safetensors.torch import load_file, save_file

from gpu_worker.build import load_engine
from gpu_worker.engine.engine import Engine
from gpu_worker.layers.blocks import PlainDecoder, stacks_of
from gpu_worker.model import kept_answers, prepare, shortcuts
from gpu_worker.model.kept_answers import answers_of
from gpu_worker.model.logits_check import LogitsCheck, ask_untouched
from gpu_worker.model.model import BaseModel
from gpu_worker.tasks.model_tasks import decoder_of
from lora_kernels import cpu
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if not cpu.load():  # the cache also holds the native kernels, which must not be built for each test
        pytest.fail("this machine has no native kernels")
    monkeypatch.setenv("LORAFLEET_CACHE_DIR", str(tmp_path / "cache"))
    return make_tiny_model(tmp_path / "base")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The answers of the untouched model since the test began."""
    found: list[object] = []

    def ask(*args: object) -> LogitsCheck:
        found.append(ask_untouched(*args))  # pyright: ignore[reportArgumentType]
        return found[-1]  # pyright: ignore[reportReturnType]

    monkeypatch.setattr(prepare, "ask_untouched", ask)
    return found


def start(folder: Path) -> BaseModel:
    settings = Settings(model=str(folder), device="cpu", dtype="float32", kernels="reference")
    thread, _ = load_engine(settings, lambda _: pytest.fail("no adapter is asked for"))
    engine = thread.engine
    assert isinstance(engine, Engine)
    return engine.model


def kept(folder: Path) -> list[Path]:
    return sorted((folder.parent / "cache/answers").iterdir())


def test_a_later_start_does_not_run_the_untouched_model(
    folder: Path, asked: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start(folder)
    monkeypatch.setattr(shortcuts, "agrees", lambda *_, **__: pytest.fail("blocks are compared again"))
    second = start(folder)
    assert len(asked) == 1
    assert len(kept(folder)) == 1
    assert first.num_shortcuts == second.num_shortcuts > 0
    assert len(stacks_of(first.module)) == len(stacks_of(second.module)) == 1
    decoder: Any = decoder_of(second.module)
    assert type(decoder.forward.__self__) is PlainDecoder


def test_blocks_that_did_not_agree_stay_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortcuts, "agrees", lambda *_, **__: False)
    start(folder)
    monkeypatch.undo()
    monkeypatch.setenv("LORAFLEET_CACHE_DIR", str(folder.parent / "cache"))
    assert start(folder).num_shortcuts == 0


def test_without_comparisons_kept_blocks_are_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(folder)
    (path,) = kept(folder)
    save_file(load_file(path), path, {"num": "2", "width": "64", "sensitivity": "0.0"})
    assert start(folder).num_shortcuts > 0


def other_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    before = (folder / "model.safetensors").stat()
    save_file(
        {name: tensor.flip(0) for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    os.utime(folder / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))


def other_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-04'))


@pytest.mark.parametrize("change", [other_weights, other_config])
def test_a_changed_file_is_noticed(folder: Path, asked: list[object], change: Callable[[Path], None]) -> None:
    start(folder)
    (before,) = kept(folder)
    change(folder)
    start(folder)
    assert len(asked) == 2
    assert kept(folder) != [before], "one model keeps one file"
    assert len(kept(folder)) == 1


@pytest.mark.parametrize("what", ["torch", "transformers"])
def test_another_library_is_noticed(folder: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    before = answers_of(model, folder, None)
    assert answers_of(model, folder, None) == before
    monkeypatch.setattr(getattr(kept_answers, what), "__version__", "0.0.1")
    assert answers_of(model, folder, None) != before


def test_other_code_and_other_processors_are_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    before = answers_of(model, folder, None)
    with monkeypatch.context() as patch:
        patch.setattr(kept_answers, "state_of", lambda path: "changed")
        assert answers_of(model, folder, None) != before
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": False})
    assert answers_of(model, folder, None) != before


def test_an_engine_that_answers_otherwise_is_refused(folder: Path) -> None:
    start(folder)
    (path,) = kept(folder)
    tensors = load_file(path)
    about = {"num": "2", "width": "64", "sensitivity": "0.0"}
    save_file({name: tensor.flip(-1) if "logits" in name else tensor for name, tensor in tensors.items()}, path, about)
    with pytest.raises(BadRequest, match=f"its logits are off by .* as stored in {path}"):
        start(folder)


def test_what_cannot_be_read_is_asked_again(folder: Path, asked: list[object]) -> None:
    start(folder)
    (path,) = kept(folder)
    path.write_bytes(path.read_bytes()[:100])
    start(folder)
    start(folder)
    assert len(asked) == 2


def test_a_few_models_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_answers, "MAX_KEPT", 2)
    for seed in range(3):
        start(make_tiny_model(folder.parent / f"model-{seed}", seed=seed))
    assert len(kept(folder)) == 2
