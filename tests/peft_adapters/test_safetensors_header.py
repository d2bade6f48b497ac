"""No hostile header passes the parser, crashes it or makes it use much memory; valid headers are read exactly."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import examples
from helpers.adapter_files import lora_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from peft_adapters.safetensors_header import (
    ITEM_BYTES,
    MAX_HEADER_BYTES,
    MAX_KEPT_HEADER_BYTES,
    MAX_TENSORS,
    TensorInfo,
    parse_header,
    read_header,
)
from protocol.wire.errors import AdapterRefused

Header = dict[str, Any]


def build(header: Header | bytes, num_body_bytes: int = 0) -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + bytes(num_body_bytes)


def good_header(shapes: list[tuple[int, ...]], dtypes: list[str]) -> tuple[Header, int]:
    """Return a header of contiguous tensors, and the number of bytes of their data."""
    header: Header = {}
    at = 0
    for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
        num_bytes = int(np.prod(shape)) * ITEM_BYTES[dtype]
        header[f"t{i}"] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + num_bytes]}
        at += num_bytes
    return header, at


@st.composite
def good_files(draw: st.DrawFn) -> tuple[Header, int]:
    shapes = draw(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=2).map(tuple), min_size=2, max_size=6))
    dtypes = draw(st.lists(st.sampled_from(list(ITEM_BYTES)), min_size=len(shapes), max_size=len(shapes)))
    return good_header(shapes, dtypes)


def check_layout(tensors: dict[str, TensorInfo], file_size: int) -> None:
    """Assert that tensors do not overlap, lie inside the file, and have the sizes that their shapes need."""
    at = None
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.end)):
        assert at is None or tensor.begin == at
        assert tensor.end - tensor.begin == int(np.prod(tensor.shape)) * ITEM_BYTES[tensor.dtype]
        assert len(tensor.shape) in (1, 2)
        at = tensor.end
    assert at is None or at == file_size


def test_reads_what_the_library_writes() -> None:
    tensors = {name: tensor.astype(np.float16) for name, tensor in lora_tensors().items()}
    raw = save(tensors, metadata={"format": "pt"})
    found = parse_header(raw, len(raw))
    assert found.keys() == tensors.keys()
    for name, info in found.items():
        assert info.dtype == "F16"
        assert np.array_equal(np.frombuffer(raw[info.begin : info.end], np.float16).reshape(info.shape), tensors[name])


@given(good_files(), st.randoms())
def test_order_of_entries_and_padding_do_not_matter(file: tuple[Header, int], random: Any) -> None:
    header, num_bytes = file
    entries = list(header.items())
    random.shuffle(entries)
    raw = build(json.dumps(dict(entries)).encode() + b"   ", num_bytes)
    tensors = parse_header(raw, len(raw))
    assert tensors.keys() == header.keys()
    check_layout(tensors, len(raw))


def first(header: Header) -> Header:
    return next(iter(header.values()))


def last(header: Header) -> Header:
    return list(header.values())[-1]


def change(key: str, value: Any) -> Callable[[Header], None]:
    def apply(header: Header) -> None:
        first(header)[key] = value

    return apply


def shift(begin: int, end: int) -> Callable[[Header], None]:
    """Return a change that moves the begin and end offsets of the last tensor."""

    def apply(header: Header) -> None:
        offsets = last(header)["data_offsets"]
        last(header)["data_offsets"] = [offsets[0] + begin, offsets[1] + end]

    return apply


ATTACKS: dict[str, Callable[[Header], None]] = {
    "overlap": shift(-1, -1),
    "hole": shift(1, 1),
    "too long for its shape": shift(0, 4),
    "whole file twice": lambda header: header.update(copy=dict(last(header))),
    "reaches behind the file": shift(1 << 20, 1 << 20),
    "negative offsets": change("data_offsets", [-4, 0]),
    "backwards": change("data_offsets", [8, 4]),
    "huge offsets": change("data_offsets", [0, 1 << 63]),
    "one offset": change("data_offsets", [0]),
    "offsets as text": change("data_offsets", ["0", "4"]),
    "offsets as floats": change("data_offsets", [0.0, 4.0]),
    "offsets as truth": change("data_offsets", [False, True]),
    "five dimensions": change("shape", [1, 1, 1, 1, 1]),
    "no dimension": change("shape", []),
    "negative shape": change("shape", [-1, -4]),
    "huge shape": change("shape", [1 << 40, 1 << 40]),
    "digits of a bomb": change("shape", [10**4000]),
    "shape as text": change("shape", "11"),
    "doubles": change("dtype", "F64"),
    "integers": change("dtype", "I8"),
    "an unknown dtype": change("dtype", "X"),
    "a dtype that is a list": change("dtype", ["F32"]),
    "one key too many": lambda header: first(header).update(extra=1),
    "one key missing": lambda header: first(header).pop("shape"),
    "a long name": lambda header: header.update({"x" * 513: header.pop("t0")}),
    "an entry that is a list": lambda header: header.update(t0=[1]),
    "an entry that is null": lambda header: header.update(t0=None),
    "metadata that is no map": lambda header: header.update(__metadata__=[]),
    "metadata of numbers": lambda header: header.update(__metadata__={"a": 1}),
}


@pytest.mark.parametrize("attack", ATTACKS)
@settings(max_examples=examples.of(20))
@given(file=good_files())
def test_refuses(attack: str, file: tuple[Header, int]) -> None:
    header, num_bytes = file
    good = build(header, num_bytes)
    assert parse_header(good, len(good))
    ATTACKS[attack](header)
    raw = build(header, num_bytes)
    with pytest.raises(AdapterRefused):
        parse_header(raw, len(raw))


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"[]",
        b"1",
        b"{",
        b"\xff\xfe",
        b'{"t0":1,"t0":2}',
        b'{"t0":{"dtype":"F32","dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"t0":' + b"9" * 100_000 + b"}",
    ],
)
def test_refuses_what_is_not_a_header(head: bytes) -> None:
    raw = build(head)
    with pytest.raises(AdapterRefused):
        parse_header(raw, len(raw))


@given(good_files(), st.integers(1, 64), st.booleans())
def test_refuses_a_file_that_is_cut_or_has_a_tail(file: tuple[Header, int], by: int, cut: bool) -> None:
    raw = build(*file)
    changed = raw[: max(0, len(raw) - by)] if cut else raw + bytes(by)
    with pytest.raises(AdapterRefused):
        parse_header(changed, len(changed))


@given(good_files(), st.data())
def test_never_fails_otherwise(file: tuple[Header, int], data: st.DataObject) -> None:
    """Randomly changed bytes are refused, or still describe a valid layout."""
    raw = bytearray(build(*file))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        tensors = parse_header(bytes(raw), len(raw))
    except AdapterRefused:
        return
    check_layout(tensors, len(raw))


@given(st.binary(max_size=200), st.integers(0, 1 << 62))
def test_takes_any_bytes(raw: bytes, file_size: int) -> None:
    try:
        tensors = parse_header(raw, file_size)
    except AdapterRefused:
        return
    check_layout(tensors, file_size)


@pytest.mark.parametrize("claimed", [MAX_HEADER_BYTES + 1, 1 << 32, (1 << 64) - 1])
def test_a_size_bomb_costs_nothing(claimed: int) -> None:
    raw = struct.pack("<Q", claimed) + b"{}"
    tracemalloc.start()
    with pytest.raises(AdapterRefused, match="the limit is"):
        parse_header(raw, len(raw))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 16


@pytest.mark.parametrize("piece", [b'"%d":{},', b'"%d":[],', b'"%d":"",'])
def test_memory_is_bounded(piece: bytes) -> None:
    """The most expensive megabyte of JSON stays within 64 MB, and its refusal is short."""
    body = b"".join(piece % i for i in range(70_000))[: MAX_HEADER_BYTES - 100].rpartition(b",")[0]
    raw = build(b"{" + body + b"}")
    tracemalloc.start()
    with pytest.raises(AdapterRefused, match=str(MAX_TENSORS)) as refused:
        parse_header(raw, len(raw))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20
    assert len(refused.value.message) < 1000


def test_a_refusal_is_short_and_printable() -> None:
    header = {"\x1b[31m" + "x" * 5000 + str(i): {"dtype": "F64"} for i in range(100)}
    raw = build(header)
    with pytest.raises(AdapterRefused) as refused:
        parse_header(raw, len(raw))
    assert refused.value.message.isprintable()
    assert len(refused.value.message) < 2000
    assert "and 94 more" in refused.value.message


@pytest.mark.parametrize("padding", [0, MAX_KEPT_HEADER_BYTES])
def test_a_header_that_is_known_is_read_no_other_way(padding: int) -> None:
    header, num_body_bytes = good_header([(2, 3), (4,)], ["F32", "BF16"])
    raw = build(header | {"__metadata__": {"padding": padding * "x"}}, num_body_bytes)
    for _ in range(2):
        found = read_header(raw)
        assert dict(found) == parse_header(raw, len(raw))
        assert (read_header(bytearray(raw)) is found) == (padding == 0)
        with pytest.raises(AdapterRefused, match="where its header describes"):  # the same header in another file
            read_header(raw + b"x")


@pytest.mark.parametrize("raw", [b"", b"1234567", build(b"{", 10), struct.pack("<Q", MAX_HEADER_BYTES + 1)])
def test_what_is_no_header_is_refused_each_time(raw: bytes) -> None:
    for _ in range(2):
        with pytest.raises(AdapterRefused):
            read_header(raw)
