"""Building the native kernels: once per version, and what happens where it cannot be done."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kernels.cpu import build as build_module
from lora_kernels.cpu.build import BuildError, build_library, cache_dir

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


def test_native_kernels_are_there_where_a_compiler_is():
    if shutil.which("g++"):
        from lora_kernels import cpu

        assert cpu.load()
        assert build_library().is_relative_to(cache_dir())


def test_a_second_build_takes_the_cached_file(monkeypatch, tmp_path):
    monkeypatch.setenv("LORAFLEET_CACHE_DIR", str(tmp_path))
    compiled = []

    def compile_nothing(compiler: str, build_dir: Path) -> Path:
        compiled.append(compiler)
        library = build_dir / "library.so"
        library.write_bytes(b"")
        return library

    monkeypatch.setattr(build_module, "_compile", compile_nothing)
    first = build_library()
    assert build_library() == first
    assert len(compiled) == 1
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build_library() == first  # a finished build needs no compiler
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(build_module, "_COMMON_FLAGS", ("-O0",))
    assert build_library() != first
    assert [path.suffix for path in tmp_path.iterdir()] == [".so", ".so"]


def test_a_failing_compiler_is_reported_with_its_words(monkeypatch, tmp_path):
    monkeypatch.setenv("LORAFLEET_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build_module, "_COMMON_FLAGS", ("--no-such-flag",))
    with pytest.raises(BuildError, match="no-such-flag"):
        build_library()
    assert list(tmp_path.iterdir()) == []


def test_another_processor_family_is_refused(monkeypatch):
    monkeypatch.setattr(build_module.platform, "machine", lambda: "aarch64")
    with pytest.raises(BuildError, match="aarch64"):
        build_library()


def test_without_a_compiler_torch_serves_and_says_so_once(tmp_path):
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
