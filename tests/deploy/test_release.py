"""A release has the same version everywhere; its workflow passes the right commands to docker, gh and make."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.scripts import script

ROOT = Path(__file__).parents[2]
WORKFLOW = ROOT / ".github/workflows/release.yml"
NOTED = """#!/bin/sh
echo "$(basename "$0") $*" >> "$NOTED"
case "$*" in *--password-stdin*) cat > /dev/null ;; esac  # who writes into a closed pipe is killed
"""
FILES = (
    "pyproject.toml",
    "CHANGELOG.md",
    "deploy/Dockerfile",
    "deploy/helm/lorafleet/Chart.yaml",
    "docs/kubernetes.md",
)
RELEASE = script(".ci/release.py")


def test_every_file_has_the_version_of_the_package(capfd: pytest.CaptureFixture[str]) -> None:
    assert RELEASE.main([]) == 0
    assert "### Serving" in capfd.readouterr().out


@pytest.mark.parametrize("changed", FILES)
def test_a_file_with_another_version_is_named(changed: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    text = (tmp_path / changed).read_text()
    before, version, after = text.rpartition("0.1.0")
    (tmp_path / changed).write_text(f"{before}9.9.9{after}")
    assert RELEASE.main([f"v{version}"], tmp_path) == 1
    assert changed in capfd.readouterr().err


def test_notes_end_where_the_next_version_begins(tmp_path: Path) -> None:
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [0.2.0]\n\nNew.\n\n### A\n\n## [0.1.0]\n\nFirst.\n")
    assert [RELEASE.notes(tmp_path, version) for version in ("0.2.0", "0.1.0", "0.1", "0.3.0")] == [
        "New.\n\n### A",
        "First.",
        "",
        "",
    ]


def run_job(name: str, folder: Path, machine: str = "") -> list[str]:
    """Run the shell commands of a job's steps; return the commands that they pass to docker, gh and make."""
    jobs: dict[str, Any] = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    for program in ("docker", "gh", "make"):
        (programs / program).write_text(NOTED)
        (programs / program).chmod(0o755)
    environment = {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "NOTED": str(folder / "noted"), "REGISTRY": "ghcr.io",
        "GITHUB_REF_NAME": "v0.1.0", "GITHUB_REPOSITORY": "Some/Fleet", "GITHUB_REPOSITORY_OWNER": "Some",
        "GITHUB_SERVER_URL": "https://forge.example", "GITHUB_ACTOR": "me", "RUNNER_TEMP": str(folder),
    }  # fmt: skip
    for step in jobs[name]["steps"]:
        if "run" in step:
            own = {key: value.replace("${{ matrix.machine }}", machine) for key, value in step.get("env", {}).items()}
            shell = step["run"].replace("${{ matrix.machine }}", machine)
            subprocess.run(["bash", "-euo", "pipefail", "-c", shell], cwd=ROOT, env={**environment, **own}, check=True)
    return (folder / "noted").read_text().splitlines() if (folder / "noted").exists() else []


def test_the_workflow_checks_the_version_of_its_tag(tmp_path: Path) -> None:
    assert run_job("version", tmp_path) == []


def test_the_workflow_builds_and_tries_a_wheel(tmp_path: Path) -> None:
    assert run_job("wheel", tmp_path, "aarch64") == ["make wheel test-wheel MACHINE=aarch64"]


def test_the_workflow_pushes_what_it_publishes_under_one_name(tmp_path: Path) -> None:
    commands = [line for machine in ("x86_64", "aarch64") for line in run_job("image", tmp_path, machine)]
    pushed = {line.removeprefix("docker push ") for line in commands if line.startswith("docker push ")}
    built = {line.partition(" -t ")[2].removesuffix(" .") for line in commands if line.startswith("docker build ")}
    assert built == pushed
    (tmp_path / "noted").unlink()
    *_, control, worker, release = run_job("publish", tmp_path)
    named = {word for line in (control, worker) for word in line.split() if word.endswith(("-x86_64", "-aarch64"))}
    assert named == pushed
    assert " -t ghcr.io/some/lorafleet-worker:0.1.0 " in worker
    assert release.startswith("gh release create v0.1.0 ")
    assert "](https://forge.example/Some/Fleet/blob/v0.1.0/docs/" in (tmp_path / "notes.md").read_text()
    assert "](docs/" not in (tmp_path / "notes.md").read_text()
