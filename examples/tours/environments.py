"""A separate environment for each program, below build/tours: a virtual environment, or an npm folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from examples.tours.programs import Program

INSTALL_S = 1800.0


class NotInstallableError(Exception):
    """The registries or this machine lack something that a program needs; the text says what."""


def install(program: Program, folder: Path) -> None:
    """Install `program` below `folder`, unless it is installed already. Raises NotInstallableError."""
    stamp, wanted = folder / "installed.txt", "\n".join(program.packages)
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if is_javascript(program):
        if shutil.which("npm") is None:
            raise NotInstallableError("npm is not on this machine")
        (folder / "package.json").write_text('{"private": true, "type": "module"}\n')
        _run(["npm", "install", "--no-audit", "--no-fund", "--loglevel=error", *program.packages], folder)
    else:
        _run([sys.executable, "-m", "venv", str(folder)], folder)
        if program.shares:
            shared = [path for path in sys.path if path.endswith("site-packages")]
            Path(_site_packages(folder), "shared.pth").write_text("\n".join(shared) + "\n")
        _run([str(python(folder)), "-m", "pip", "install", "--quiet", *program.packages], folder)
    stamp.write_text(wanted)


def command(program: Program, folder: Path, script: Path) -> list[str]:
    """Return the command that runs `script` in the environment of `program`."""
    if is_javascript(program):
        return [str(folder / "node_modules/.bin/node"), str(script), *program.arguments]
    return [str(python(folder)), str(script), *program.arguments]


def version(program: Program, folder: Path) -> str:
    """Return the installed version of the program's first package; `?` if it is unknown."""
    if is_javascript(program):
        name = program.packages[0].rpartition("@")[0]
        return json.loads((folder / "node_modules" / name / "package.json").read_text())["version"]
    name = program.packages[0].split("[")[0].split("=")[0].rstrip("<>~ ")
    code = f"from importlib.metadata import version; print(version({name!r}))"
    return subprocess.run([str(python(folder)), "-c", code], capture_output=True, text=True).stdout.strip() or "?"


def is_javascript(program: Program) -> bool:
    """Return whether the program runs on Node.js."""
    return program.script.endswith(".mjs")


def python(folder: Path) -> Path:
    """Return the interpreter of the virtual environment in `folder`."""
    return folder / "bin" / "python"


def _site_packages(folder: Path) -> str:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return subprocess.run([str(python(folder)), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def _run(words: list[str], folder: Path) -> None:
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=INSTALL_S, env=environment)
    except subprocess.TimeoutExpired as error:
        raise NotInstallableError(f"{words[0]} took longer than {INSTALL_S:.0f} s") from error
    if done.returncode != 0:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise NotInstallableError(next((line for line in lines if "rror" in line), (lines or ["no reason given"])[-1]))
