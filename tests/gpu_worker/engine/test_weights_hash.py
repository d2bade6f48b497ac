"""Weights are told apart by samples of their numbers, however their files are cut."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from gpu_worker.loading.weights import SAMPLE, STRIDE, weights_hash
from protocol.runtime.model_files import GGUF_LINK


def tensors() -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(3)
    large = torch.randn(3 * STRIDE // 8, generator=made).reshape(-1, 64)  # 1.5 strides
    return {"large": large, "small": torch.randn(64, generator=made), "half": large.half() + 1}


def folder_of(folder: Path, *files: dict[str, Tensor]) -> Path:
    folder.mkdir()
    for i, content in enumerate(files):
        save_file(content, folder / f"model-{i}.safetensors", {"format": "pt", "made": folder.name})
    return folder


def test_the_same_weights_have_the_same_hash_in_one_file_or_in_several(tmp_path: Path) -> None:
    whole, parts = tensors(), tensors()
    shards = [{"half": parts["half"]}, {name: parts[name] for name in ("small", "large")}]
    found = {weights_hash(folder_of(tmp_path / name, *files)) for name, files in (("a", [whole]), ("b", shards))}
    assert len(found) == 1
    assert found != {""}


def test_other_numbers_names_shapes_and_dtypes_have_another(tmp_path: Path) -> None:
    trained, first, last, small, named, shaped, typed = (tensors() for _ in range(7))
    trained["large"] += 1e-6
    first["large"].flatten()[0] += 1
    last["large"].flatten()[-1] += 1
    small["small"][31] += 1
    named["tall"] = named.pop("small")
    shaped["small"] = shaped["small"].reshape(8, 8)
    typed["half"] = typed["half"].view(torch.int16)
    cases = [tensors(), trained, first, last, small, named, shaped, typed]
    found = [weights_hash(folder_of(tmp_path / str(i), case)) for i, case in enumerate(cases)]
    assert len(set(found)) == len(cases)


def test_a_change_between_two_samples_is_not_seen_as_the_page_says(tmp_path: Path) -> None:
    changed = tensors()
    changed["large"].flatten()[SAMPLE] += 1  # bytes 16384 to 16388: after the first sample, before the second
    one, other = (weights_hash(folder_of(tmp_path / n, c)) for n, c in (("a", tensors()), ("b", changed)))
    assert one == other


def test_gguf_and_folders_without_weights(tmp_path: Path) -> None:
    assert weights_hash(tmp_path) == ""
    (tmp_path / GGUF_LINK).write_bytes(b"GGUF" + bytes(range(256)) * 400)
    one = weights_hash(tmp_path)
    (tmp_path / GGUF_LINK).write_bytes(b"GGUF" + bytes(range(1, 256)) * 400)
    assert "" != one != weights_hash(tmp_path)
