"""A wheel that carries the native kernels serves where no compiler is: `make test-wheel`."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from helpers.factories import make_adapter, make_tiny_model
from helpers.fleets import MARKER
from helpers.processes import with_variable

from lora_kernels.cpu.build import ISA_FLAGS, library_name

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.wheel,
    pytest.mark.timeout(900),
    pytest.mark.skipif(platform.machine() not in ISA_FLAGS or not shutil.which("g++"), reason="nothing to compile"),
]

WHICH = "from lora_kernels import cpu; from lora_kernels.cpu import build; print(cpu.load(), build.build_library())"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel for this processor."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "LORAFLEET_WHEEL": platform.machine()})
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Install it where neither sources nor programs but its own are found; return the variables to start it with.

    What it depends on is this environment's: a `.pth` file there, and so our sources, counts for this one alone.
    """
    home = tmp_path_factory.mktemp("home")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home / "venv")], check=True)
    purelib = next((home / "venv/lib").glob("python*/site-packages"))
    (purelib / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [sys.executable, "-m", "pip", "--python", str(home / "venv/bin/python"), "install", "--no-deps"]
    subprocess.run([*command, "--ignore-installed", "--no-index", "--quiet", str(wheel)], check=True)
    return {
        "PATH": str(home / "venv/bin"), "HOME": str(home), "LORAFLEET_CACHE_DIR": str(home / "cache"),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def test_the_wheel_is_named_by_what_it_needs(wheel: Path) -> None:
    assert wheel.name.split("-")[2:4] == ["py3", "none"], "it is tied to no version of Python"
    assert wheel.stem.endswith(platform.machine())
    glibc = int(wheel.stem.split("manylinux_2_")[1].split("_")[0])
    content = zipfile.ZipFile(wheel)
    names = {f"lora_kernels/cpu/{library_name(isa)}" for isa in ("", *ISA_FLAGS[platform.machine()])}
    assert names == {name for name in content.namelist() if name.endswith(".so")}
    libraries = b"".join(content.read(name) for name in names)
    assert b"GLIBC_2." in libraries
    assert not any(f"GLIBC_2.{later}".encode() in libraries for later in range(glibc + 1, glibc + 50))


def test_its_kernels_load_without_a_compiler(clean: dict[str, str], tmp_path: Path) -> None:
    command = [f"{clean['PATH']}/python", "-c", WHICH]
    done = subprocess.run(command, env=clean, cwd=tmp_path, capture_output=True, text=True)
    home = Path(clean["HOME"]).resolve()
    loaded, library = done.stdout.split()
    assert loaded == "True", done.stderr
    assert Path(library).resolve().is_relative_to(home / "venv")


def test_the_demo_runs_from_it_without_a_compiler(clean: dict[str, str], tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "tiny", max_len=2048)
    for seed, name in enumerate(("pirate", "json"), start=1):
        make_adapter(tmp_path / "adapters" / name, model, seed=seed, rank=4 * seed)
    marker = secrets.token_hex(8)
    command = [f"{clean['PATH']}/lorafleet", "demo", "--once", "--model", str(model), "--device", "cpu"]
    command += ["--adapters", str(tmp_path / "adapters"), "--data", str(tmp_path / "data"), "--port", "0"]
    command += ["--tokens", "200", "--kernels", "auto"]
    environment = {**clean, MARKER: marker, "COLUMNS": "100"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "engine steps generated a token for all" in done.stdout
    logs = [path.read_text(errors="replace") for path in (tmp_path / "data").rglob("*.log")]
    assert logs, "the check below would prove nothing"
    assert not any("plain torch" in log for log in logs)
    assert not [*Path(clean["LORAFLEET_CACHE_DIR"]).glob("lora_kernels*")], "nothing was compiled"
    assert not with_variable(MARKER, marker)
