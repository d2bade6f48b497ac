"""Building the native kernels: once per version, and the fallback where they cannot be built."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lora_kernels import cpu
from lora_kernels.cpu.build import ISA_FLAGS, BuildError, build_library, cache_dir

SERVE_ONE_OP = """
import logging, torch
from lora_kernels import ops
logging.basicConfig(format="%(levelname)s %(name)s %(message)s")
for _ in range(2):
    x = torch.ones(2, 4)
    print(ops.linear(x, ops.pack_linear(torch.ones(3, 4))).tolist())
try:
    ops.rms_norm(x, x[0], 1e-5, impl="cpu")
except RuntimeError as error:
    print("refused:", error)
"""


def test_native_kernels_are_there_where_a_compiler_is() -> None:
    if shutil.which("g++"):
        assert cpu.load()
        assert cpu.isa() == cpu.isas()[0]
        assert build_library().is_relative_to(cache_dir())
        assert build_library(cpu.isa()).is_relative_to(cache_dir())


def test_a_machine_compiles_only_the_instruction_set_that_it_uses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, log = tmp_path / "cache", tmp_path / "log"
    monkeypatch.setenv("LORAFLEET_CACHE_DIR", str(cache))
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path / "compiler", log)))
    with caplog.at_level(logging.INFO):
        library = build_library("avx2", machine="x86_64")
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if line.startswith("compiling native kernels for avx2: first start only")]
    assert sorted(path.name for path in cache.glob("*.so")) == sorted(
        (library.name, library.name.replace("-avx2", "")), key=str
    )
    runs = log.read_text().splitlines()
    sources = [run for run in runs if "/isa/" in run and " -c " in run]
    assert len(sources) == 4
    assert all("-mavx2" in run and "avx512" not in run for run in sources)
    assert str(cache / library.name.replace("-avx2", "")) in runs[-1], "it is linked to the operations"
    build_library("avx512_vnni", machine="x86_64")
    more = log.read_text().splitlines()[len(runs) :]
    assert len(more) == len(sources) + 1, "the operations are there"
    assert all("-mavx512vnni" in run for run in more[:-1])


def test_the_best_instruction_set_is_the_first() -> None:
    isas = cpu.isas()
    if not isas:
        pytest.skip("no native kernels")
    assert set(isas) <= set(ISA_FLAGS[platform.machine()])
    assert isas[-1] in ("avx2", "neon")
    assert isas[0] == cpu.tried_isas()[0]
    if {"avx512_bf16", "avx512_vnni"} <= set(isas):
        is_amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
        assert (isas.index("avx512_bf16") < isas.index("avx512_vnni")) == is_amd


def test_an_instruction_set_is_built_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not cpu.load():
        pytest.skip("no native kernels")
    best, lowest = cpu.isa(), cpu.isas()[-1]
    cpu._library_of.cache_clear()
    monkeypatch.setenv("LORAFLEET_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"its kernels cannot be used: no C\+\+ compiler"):
        cpu.set_isa(lowest)
    with pytest.raises(ValueError, match="this processor has no sse2"):
        cpu.set_isa("sse2")
    assert "no-such-file" in torch.ops.lorafleet.use_isa(lowest, "/no-such-file.so")
    assert cpu.isa() == best, "the kernels in use stay"


def test_a_second_build_takes_the_cached_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache, log = tmp_path / "cache", tmp_path / "log"
    monkeypatch.setenv("LORAFLEET_CACHE_DIR", str(cache))
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path / "compiler", log)))
    first = build_library()
    num_runs = len(log.read_text().splitlines())
    assert num_runs > 1
    assert build_library() == first
    assert len(log.read_text().splitlines()) == num_runs
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build_library() == first, "a finished build needs no compiler"
    monkeypatch.setenv("CXX", str(tmp_path / "compiler"))
    assert build_library(flags=("-O0",)) != first
    assert len(list(cache.glob("*.so"))) == 2


def test_a_library_that_others_may_write_is_built_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache, log = tmp_path / "cache", tmp_path / "log"
    monkeypatch.setenv("LORAFLEET_CACHE_DIR", str(cache))
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path / "compiler", log)))
    library = build_library()
    right = library.read_bytes()
    (tmp_path / "evil").write_bytes(b"evil")
    for is_link in (False, True):
        library.unlink()
        if is_link:
            library.symlink_to(tmp_path / "evil")
        else:
            library.write_bytes(b"evil")
            library.chmod(0o666)
        assert build_library() == library
        assert (library.read_bytes(), library.is_symlink()) == (right, False)
    cache.chmod(0o777)
    assert build_library() == library
    assert cache.stat().st_mode & 0o777 == 0o755


def test_a_group_that_may_write_new_files_has_no_part_in_a_build(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("LORAFLEET_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path / "compiler", log)))
    before = os.umask(0o002)
    try:
        library = build_library()
        num_runs = len(log.read_text().splitlines())
        assert build_library() == library
    finally:
        os.umask(before)
    assert len(log.read_text().splitlines()) == num_runs, "it is built once"
    assert library.stat().st_mode & 0o777 == 0o755


def test_processor_families_share_a_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORAFLEET_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path / "compiler", tmp_path / "log")))
    assert len({build_library(machine=machine) for machine in ISA_FLAGS}) == len(ISA_FLAGS)


def test_of_several_that_start_together_one_builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("LORAFLEET_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path / "compiler", log)))
    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(lambda _: build_library(), range(4)))
    assert len(set(built)) == 1
    runs = log.read_text().splitlines()
    assert sum("core.cpp" in run for run in runs) == 1


def fake_compiler(path: Path, log: Path) -> Path:
    """Write a compiler script that logs its arguments and creates an empty output file."""
    path.write_text(f"""#!/bin/sh
echo "$@" >> {log}
while [ "$1" != -o ]; do shift; done
: > "$2"
""")
    path.chmod(0o755)
    return path


def test_a_failing_compiler_is_reported_with_its_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORAFLEET_CACHE_DIR", str(tmp_path))
    with pytest.raises(BuildError, match="no-such-flag"):
        build_library(flags=("--no-such-flag",))
    assert [path.name for path in tmp_path.iterdir()] == ["lora_kernels.lock"]


def test_another_processor_family_is_refused() -> None:
    with pytest.raises(BuildError, match="riscv64"):
        build_library(machine="riscv64")


def test_without_a_compiler_torch_serves_and_says_so_once(tmp_path: Path) -> None:
    environment = {**os.environ, "CXX": "no-such-compiler", "LORAFLEET_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    result = subprocess.run(
        [sys.executable, "-c", SERVE_ONE_OP], env=environment, capture_output=True, text=True, check=True
    )
    values, again, refused = result.stdout.splitlines()
    assert values == again == "[[4.0, 4.0, 4.0], [4.0, 4.0, 4.0]]"
    assert refused.startswith("refused: the native CPU kernels cannot be used")
    assert result.stderr.count("no C++ compiler: no-such-compiler is not on the path") == 1
    assert result.stderr.startswith(logging.getLevelName(logging.WARNING))
