"""LoRA in GGUF, written by gguf's own library, is planned as in PEFT's form; all else is refused within limits."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
from helpers import examples
from helpers.adapter_files import BASE, refusal
from helpers.other_formats import permute, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_adapters.format import parse_header, read_adapter
from peft_adapters.formats.gguf import ARCHITECTURES, convert_gguf
from peft_adapters.formats.gguf_header import MAX_FIELDS, MAX_ITEMS, parse_gguf
from peft_adapters.safetensors_header import MAX_TENSORS
from protocol.wire.errors import AdapterRefused

LLAMA = msgspec.structs.replace(BASE, head_dim=8)
QWEN = msgspec.structs.replace(BASE, model_type="qwen3")
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
RANDOM = np.random.default_rng(0)
PAIRS = {
    Q: (RANDOM.normal(size=(2, 16)).astype("f4"), RANDOM.normal(size=(16, 2)).astype("f4")),
    V: (RANDOM.normal(size=(3, 16)).astype("f4"), RANDOM.normal(size=(16, 3)).astype("f4")),
}


def plan(raw: bytes, base: Any = LLAMA) -> Any:
    return convert_gguf(parse_gguf(raw, len(raw)), base)


def test_rows_of_q_come_back_in_their_order(tmp_path: Path) -> None:
    raw = write_gguf(PAIRS, tmp_path / "a.gguf", "llama", 6.0, heads=(2, 2)).read_bytes()
    found = plan(raw)
    out = b"".join(bytes(piece) for piece in found.weights(memoryview(raw)))
    tensors = parse_header(out, len(out))
    spec = read_adapter(found.config, tensors, LLAMA)
    assert {part.site: (part.rank, part.scale) for part in spec.sites} == {Q: (2, 3.0), V: (3, 2.0)}
    for part in spec.sites:
        for name, expected in zip((part.a, part.b), PAIRS[part.site], strict=True):
            info = tensors[name]
            numbers = np.frombuffer(out, "<f4", expected.size, info.begin).reshape(info.shape)
            assert np.array_equal(numbers, expected)


def test_without_alpha_the_factor_is_one(tmp_path: Path) -> None:
    raw = write_gguf(PAIRS, tmp_path / "a.gguf", "qwen3", 0.0).read_bytes()
    found = plan(raw, QWEN)
    assert [part.scale for part in read_adapter(found.config, found.infos(), QWEN).sites] == [1.0, 1.0]


def test_half_numbers_stay_half(tmp_path: Path) -> None:
    raw = write_gguf(PAIRS, tmp_path / "a.gguf", "qwen3", 4.0, dtype=np.float16).read_bytes()
    assert {info.dtype for info in plan(raw, QWEN).infos().values()} == {"F16"}


def test_invocation_tokens_are_taken(tmp_path: Path) -> None:
    raw = write_gguf(PAIRS, tmp_path / "a.gguf", "qwen3", 4.0, invocation=[7, 11]).read_bytes()
    found = plan(raw, QWEN)
    assert read_adapter(found.config, found.infos(), QWEN).invocation == (7, 11)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_are_those_of_gguf_s_own_map(name: str) -> None:
    arch = next(arch for arch, own in gguf.MODEL_ARCH_NAMES.items() if own == name)
    names = gguf.get_tensor_name_map(arch, 2)
    for weight, module in ARCHITECTURES[name].layers.items():
        assert names.get_name(f"model.layers.1.{module}.weight", (".weight",)) == f"blk.1.{weight}.weight"
    assert names.get_name("lm_head.weight", (".weight",)) in ("output.weight", None)


# ---------------------------------------------------------------- refused


def file(**changes: Any) -> Any:
    """Return a function that writes a file with these changes, and the base for which it is read."""
    values = {"pairs": PAIRS, "architecture": "llama", "alpha": 6.0} | changes

    def write(folder: Path) -> bytes:
        return write_gguf(path=folder / "a.gguf", **values).read_bytes()

    return write


def patched(**changes: int) -> Any:
    """Return a function that writes a good file with some numbers of its first 24 bytes replaced."""
    at = {"magic": (0, "<I"), "version": (4, "<I"), "tensors": (8, "<Q"), "fields": (16, "<Q"), "key": (24, "<Q")}

    def write(folder: Path) -> bytes:
        raw = bytearray(file()(folder))
        for name, value in changes.items():
            struct.pack_into(at[name][1], raw, at[name][0], value)
        return bytes(raw)

    return write


def cut(size: int) -> Any:
    return lambda folder: file()(folder)[:size]


def shared(num: int, size: int = 8) -> Any:
    """Return a function that writes a file of many tensors over the same bytes, each with `size` numbers."""

    def write(folder: Path) -> bytes:
        entries = b"".join(
            struct.pack("<Q", len(name)) + name + struct.pack("<IQQIQ", 2, size // 2, 2, 0, 32 * (size > 8) * i)
            for i in range(num)
            for name in [b"blk.%d.attn_q.weight.lora_%c" % (i // 2, b"ab"[i % 2])]
        )
        head = b"GGUF" + struct.pack("<IQQ", 3, num, 0) + entries
        return head + bytes(-len(head) % 32 + 32 * (num + 10))

    return write


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "not GGUF": (patched(magic=1), LLAMA, "does not begin as GGUF"),
    "version 1": (patched(version=1), LLAMA, "version 1"),
    "big-endian": (patched(version=3 << 24), LLAMA, "version"),
    "too many tensors": (patched(tensors=1 << 60), LLAMA, f"the limit is {MAX_TENSORS}"),
    "too many fields": (patched(fields=1 << 60), LLAMA, f"limit is {MAX_FIELDS}"),
    "more tensors than there are": (patched(tensors=9_000), LLAMA, ""),
    "a text of 2^60 bytes": (patched(key=1 << 60), LLAMA, "the limit is"),
    "an empty file": (cut(0), LLAMA, "does not begin"),
    "a cut header": (cut(100), LLAMA, "is cut"),
    "tensors that share bytes": (shared(1000), LLAMA, "share bytes with others: blk.0.attn_q.weight.lora_b"),
    "a tensor within another": (shared(2, size=64), LLAMA, "share bytes"),
    "cut numbers": (cut(-8), LLAMA, "beyond the end"),
    "an unknown architecture": (file(architecture="falcon", pairs={}), LLAMA, "architecture falcon"),
    "another base": (file(architecture="qwen3"), LLAMA, "of type llama"),
    "a model": (file(type="model"), LLAMA, "not an adapter"),
    "another adapter": (file(adapter_type="control_vector"), LLAMA, "is not lora"),
    "alpha of NaN": (file(alpha=float("nan")), LLAMA, "not a finite number"),
    "no tensors": (file(pairs={}), LLAMA, "has no lora_a"),
    "an embedding": (file(pairs={"model.embed_tokens": PAIRS[Q]}), LLAMA, "cannot change here"),
    "ranks that do not fit": (file(pairs={V: (PAIRS[V][0], PAIRS[Q][1])}), LLAMA, "do not fit together"),
    "heads of another size": (file(), msgspec.structs.replace(BASE, head_dim=7), "not heads of 7"),
    "heads of unknown size": (file(), BASE, "not heads of 0"),
    "64-bit numbers": (file(dtype=np.float64), LLAMA, "GGUF type 28"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused(name: str, tmp_path: Path) -> None:
    write, base, reason = REFUSED[name]
    assert reason in refusal(plan, write(tmp_path), base)


def header(value: bytes, *, kind: int = 9) -> bytes:
    """Return a header without tensors, whose field "a" has this type and these bytes."""
    return b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (header(struct.pack("<IQ", 4, 1 << 60)), f"limit is {MAX_ITEMS}"),
        (header(struct.pack("<IQ", 9, 2)), "array of the type 9"),
        (header(b"", kind=77), "unknown type 77"),
        (header(struct.pack("<Q", 2) + b"\xff\xff", kind=8), "not UTF-8"),
    ],
)
def test_fields_are_bounded(raw: bytes, reason: str) -> None:
    with pytest.raises(AdapterRefused, match=reason):
        parse_gguf(raw, len(raw))


@settings(max_examples=examples.of(200), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 600), value=st.binary(min_size=1, max_size=8), size=st.integers(0, 1200))
def test_any_change_is_read_or_refused(tmp_path: Path, at: int, value: bytes, size: int) -> None:
    raw = bytearray(file()(tmp_path))
    raw[at : at + len(value)] = value
    try:
        found = plan(bytes(raw[: size or None]))
    except AdapterRefused:
        return
    assert all(tensor.source.end <= len(raw) for tensor in found.tensors)


def test_heads_are_undone_as_transformers_undoes_them() -> None:
    """The oracle is transformers' function that reads llama.cpp's models back, which was written independently."""
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    rows = RANDOM.normal(size=(32, 5)).astype("f4")
    assert np.array_equal(LlamaTensorProcessor()._reverse_permute_weights(permute(rows, 4), 4, 4), rows)
