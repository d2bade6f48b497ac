"""Runs a test on every available implementation: the reference, and the native kernels per instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lora_kernels import cpu
from lora_kernels.ops import Impl


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test with `impl` on the reference and the native kernels, one with `native` on the latter.

    With `--thorough`, the native kernels of all instruction sets are tried.
    """
    isas = cpu.isas() if metafunc.config.getoption("--thorough") else cpu.tried_isas()
    native = [f"cpu-{isa}" for isa in isas]
    for name, params in (("impl", ["reference", *native]), ("native", native)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, params, indirect=True)


def use_implementation(name: str) -> Iterator[Impl]:
    kind, _, isa = name.partition("-")
    if kind == "reference":
        yield "reference"
        return
    before = cpu.isa()
    cpu.set_isa(isa)
    yield "cpu"
    cpu.set_isa(before)


@pytest.fixture
def impl(request: pytest.FixtureRequest) -> Iterator[Impl]:
    yield from use_implementation(request.param)


@pytest.fixture
def native(request: pytest.FixtureRequest) -> Iterator[Impl]:
    yield from use_implementation(request.param)
