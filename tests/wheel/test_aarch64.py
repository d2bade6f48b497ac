"""The kernels for 64-bit Arm, run under QEMU, compute what those for AVX2 compute: `make test-wheel`.

Those for AVX2 are held to torch by tests/kernels; on Arm there need be no torch for this.
"""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path

import pytest

from lora_kernels.cpu.build import COMMON_FLAGS, ISA_FLAGS

CROSS, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
SOURCES = Path(__file__).resolve().parents[2] / "kernels/lora_kernels/cpu/csrc"
PARTS = ("core", "stack")
TOLERANCE = {"Float": 2e-5, "BFloat16": 2**-7, "Half": 2**-9, "Long": 0, "Bool": 0}
PROGRAM = Path(__file__).with_name("operations.cpp")


def build(compiler: str, machine: str, isa: str, folder: Path) -> Path:
    """Compile the program beside this file for an instruction set; return its path. It needs no library there."""
    folder.mkdir()
    flags = [*COMMON_FLAGS, "-O1", f"-I{SOURCES}", "-c"]
    sources = [PROGRAM, *(SOURCES / f"{part}.cpp" for part in PARTS)]
    jobs = [[str(source), "-o", str(folder / f"{index}.o")] for index, source in enumerate(sources)]
    jobs += [
        [str(source), "-o", str(folder / f"isa-{source.stem}.o"), *ISA_FLAGS[machine][isa]]
        for source in (SOURCES / "isa").glob("*.cpp")
    ]
    for job in jobs:
        subprocess.run([compiler, *flags, *job], check=True)
    program = folder / "operations"
    subprocess.run([compiler, "-static", "-o", str(program), *(job[2] for job in jobs), "-pthread"], check=True)
    return program


def results(command: list[str]) -> list[tuple[str, list[float]]]:
    """Return what the program prints: names with dtypes, and numbers."""
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [(line.split()[0], [*map(float, line.split()[1:])]) for line in printed.splitlines()]


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_the_program_fits_the_operations() -> None:
    """Without QEMU and a cross compiler too: a changed signature is noticed where it is changed."""
    subprocess.run(["g++", *COMMON_FLAGS, f"-I{SOURCES}", "-fsyntax-only", str(PROGRAM)], check=True)


@pytest.mark.wheel
@pytest.mark.timeout(900)
@pytest.mark.skipif(not all(map(shutil.which, (CROSS, QEMU, "g++"))), reason=f"no {CROSS} or {QEMU}")
def test_neon_computes_what_avx2_computes(tmp_path: Path) -> None:
    expected = results([str(build("g++", "x86_64", "avx2", tmp_path / "x86_64"))])
    got = results([QEMU, str(build(CROSS, "aarch64", "neon", tmp_path / "aarch64"))])
    assert [name for name, _ in got] == [name for name, _ in expected]
    assert len({name for name, _ in got}) > 60
    for (name, numbers), (_, others) in zip(got, expected, strict=True):
        assert len(numbers) == len(others)
        assert not any(map(math.isnan, others)), name
        size = max(abs(other) for other in others if math.isfinite(other))
        allowed = TOLERANCE[name.partition(":")[2]] * size
        assert all(a == b or abs(a - b) <= allowed for a, b in zip(numbers, others, strict=True)), name
