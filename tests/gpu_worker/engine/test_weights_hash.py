"""Weights are distinguished by samples of their values, independent of how files are split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gpu_worker.loading.weights import INDEX, MAX_HEADER_BYTES, SAMPLE, STRIDE, WEIGHTS, weights_hash
from protocol.runtime.model_files import GGUF_LINK
from protocol.wire.errors import BadRequest


def tensors() -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(3)
    large = torch.randn(3 * STRIDE // 8, generator=made).reshape(-1, 64)  # 1.5 strides
    return {"large": large, "small": torch.randn(64, generator=made), "half": large.half() + 1}


def folder_of(folder: Path, *files: dict[str, Tensor]) -> Path:
    folder.mkdir()
    names = [WEIGHTS] if len(files) == 1 else [f"model-{i}.safetensors" for i in range(len(files))]
    for name, content in zip(names, files, strict=True):
        save_file(content, folder / name, {"format": "pt", "made": folder.name})
    if len(files) > 1:
        places = {tensor: name for name, content in zip(names, files, strict=True) for tensor in content}
        (folder / INDEX).write_text(json.dumps({"weight_map": places}))
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
    changed["large"].flatten()[SAMPLE] += 1  # bytes 16384 to 16388, between the first and the second sample
    one, other = (weights_hash(folder_of(tmp_path / n, c)) for n, c in (("a", tensors()), ("b", changed)))
    assert one == other


def test_gguf_and_folders_without_weights(tmp_path: Path) -> None:
    assert weights_hash(tmp_path) == ""
    (tmp_path / GGUF_LINK).write_bytes(b"GGUF" + bytes(range(256)) * 400)
    one = weights_hash(tmp_path)
    (tmp_path / GGUF_LINK).write_bytes(b"GGUF" + bytes(range(1, 256)) * 400)
    assert "" != one != weights_hash(tmp_path)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 14483498224\n"


@pytest.mark.parametrize("stray", [b"", LFS_POINTER, (2).to_bytes(8, "little") + b"{}"])
@pytest.mark.parametrize("num_files", [1, 2])
def test_files_that_no_loader_reads_do_not_count(tmp_path: Path, stray: bytes, num_files: int) -> None:
    """For example weights in their original form, which repositories hold beside the form for transformers."""
    parts = [tensors()] if num_files == 1 else [{"a": torch.ones(8)}, {"b": torch.zeros(8)}]
    folder = folder_of(tmp_path / "m", *parts)
    before = weights_hash(folder)
    (folder / "consolidated.safetensors").write_bytes(stray)
    assert weights_hash(folder) == before


@pytest.mark.parametrize(
    "content",
    [
        b"", LFS_POINTER, (MAX_HEADER_BYTES + 1).to_bytes(8, "little"), (2).to_bytes(8, "little") + b"[]",
        (9).to_bytes(8, "little") + b'{"a": {}}', (10).to_bytes(8, "little") + b'{"a": "b"}',
    ],
)  # fmt: skip
def test_a_file_of_weights_that_is_none_is_named_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(BadRequest) as refused:
        weights_hash(tmp_path)
    assert str(tmp_path / WEIGHTS) in refused.value.message
    assert "\n" not in refused.value.message
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(BadRequest, match="cannot be read as weights"):
        weights_hash(tmp_path)
