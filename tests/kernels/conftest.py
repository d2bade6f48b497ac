"""Runs a test on every implementation there is here: the reference, and the native kernels per instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lora_kernels import cpu
from lora_kernels.ops import Impl


def native_isas() -> list[str]:
    """The instruction sets that this processor offers the native kernels."""
    if not cpu.load():
        return []
    best = cpu.isa()
    found = []
    for isa in ("avx2", "avx512", "avx512_bf16", "amx_bf16", "neon"):
        try:
            cpu.set_isa(isa)
        except ValueError:
            continue
        found.append(isa)
    cpu.set_isa(best)
    return found


NATIVE = [f"cpu-{isa}" for isa in native_isas()]


def use_implementation(name: str) -> Iterator[Impl]:
    kind, _, isa = name.partition("-")
    if kind == "reference":
        yield "reference"
        return
    before = cpu.isa()
    cpu.set_isa(isa)
    yield "cpu"
    cpu.set_isa(before)


@pytest.fixture(params=["reference", *NATIVE])
def impl(request: pytest.FixtureRequest) -> Iterator[Impl]:
    yield from use_implementation(request.param)


@pytest.fixture(params=NATIVE)
def native(request: pytest.FixtureRequest) -> Iterator[Impl]:
    yield from use_implementation(request.param)
