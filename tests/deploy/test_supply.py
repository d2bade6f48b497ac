"""Packages in the images are locked with hashes and have known licenses; an audit without an answer fails."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from helpers.scripts import script
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {"control": ("tracing",), "worker": ("worker", "demo", "tracing")}


def locked(image: str) -> dict[str, tuple[str, int]]:
    """Return the version and the number of hashes of each package in an image's lock file."""
    text = (ROOT / f"requirements-{image}.lock").read_text()
    found: dict[str, tuple[str, int]] = {}
    for package in re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]:
        name, version = package.split()[0].split("==")
        found[name] = (version, len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", package)))
    return found


@pytest.mark.parametrize("image", EXTRAS)
def test_an_image_installs_nothing_without_a_hash_but_torch(image: str) -> None:
    found = locked(image)
    assert all(num_hashes for _, num_hashes in found.values())
    assert not [name for name in found if name.startswith(script(".ci/lock_images.py").BY_TORCH)]
    wanted = [*PROJECT["dependencies"], *(line for e in EXTRAS[image] for line in PROJECT["optional-dependencies"][e])]
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        if name != "torch":
            assert requirement.specifier.contains(found[name][0]), f"{requirement}: run `make lock-images`"
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    assert f"pip install --no-deps --require-hashes -r requirements-{image}.lock" in dockerfile


def test_the_images_run_what_the_tests_ran_with() -> None:
    lines = (ROOT / "requirements-dev.lock").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line)
    for image in EXTRAS:
        for name, (version, _) in locked(image).items():
            assert tested.get(name, version) == version, f"{name}: run `make lock-images`"
    assert locked("control").items() <= locked("worker").items()
    assert re.search(r"^torch==\d", "\n".join(lines), re.MULTILINE)  # the Dockerfile searches for this line


def test_every_licence_is_known_and_permissive_or_reviewed() -> None:
    licences = script(".ci/licences.py")
    rows = licences.table(ROOT)
    assert len(rows) > 100, "the check would prove nothing"
    unknown = [name for name, licence, _, _ in rows if licence == "unknown"]
    others = [
        (name, licence) for name, licence, _, remark in rows if not remark and not licences.is_permissive(licence)
    ]
    assert unknown == []
    assert others == [], "look at them, then add them to REVIEWED in .ci/licences.py"
    page = (ROOT / "docs/licences.md").read_text()
    missing = [name for name, _, _, _ in rows if f"| {name} |" not in page]
    assert missing == [], "run `make licences`"


@pytest.mark.parametrize(
    ("expression", "permissive"),
    [
        ("MIT", True), ("MIT OR GPL-3.0-only", True), ("MIT AND BSD-3-Clause", True), ("", False), ("unknown", False),
        ("GPL-3.0-or-later", False), ("MIT AND LGPL-2.1-only", False), ("AGPL-3.0", False),
        ("(Apache-2.0 OR GPL-3.0-only) AND MIT", True), ("Apache-2.0 AND (GPL-3.0-only OR LGPL-3.0-only)", False),
    ],
)  # fmt: skip
def test_copyleft_is_not_permissive(expression: str, permissive: bool) -> None:
    assert script(".ci/licences.py").is_permissive(expression) is permissive


def test_an_audit_without_answers_is_no_clean_bill() -> None:
    verdict = script(".ci/audit.py").verdict
    clean = {"name": "a", "version": "1", "vulns": []}
    skipped = {"name": "b", "skip_reason": "not found"}
    bad = {"name": "c", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": []}]}
    assert verdict({"pypi": ([clean], "")})[0] == 0
    assert verdict({"pypi": ([clean, skipped], "")})[0] == 2
    assert verdict({"pypi": ([clean, skipped], ""), "osv": ([clean, {**clean, "name": "b"}], "")})[0] == 0
    assert verdict({"pypi": ([], "no route"), "osv": ([], "no route")})[0] == 2
    code, lines = verdict({"pypi": ([clean, bad], "")})
    assert code == 1
    assert "c 1: CVE-1, fixed in no version" in "\n".join(lines)


def test_images_are_pinned_by_what_the_registry_says(tmp_path: Path) -> None:
    digest = "sha256:" + "0123456789abcdef" * 4
    docker = tmp_path / "bin/docker"
    docker.parent.mkdir()
    docker.write_text(f"#!/bin/sh\ntest \"$1 $2 $3\" = 'buildx imagetools inspect' && echo 'Digest:    {digest}'\n")
    docker.chmod(0o755)
    (tmp_path / "deploy").mkdir()
    for name in (".env.example", "deploy/pin_images.sh"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / ".env").write_text("PORT=1\nQUEUE_IMAGE=old\n")
    environment = {"PATH": f"{docker.parent}:{os.environ['PATH']}"}
    command = ["bash", str(tmp_path / "deploy/pin_images.sh")]
    for _ in range(2):
        subprocess.run(command, env=environment, check=True, capture_output=True)
        lines = (tmp_path / ".env").read_text().splitlines()
        images = (line for line in (ROOT / ".env.example").read_text().splitlines() if "_IMAGE=" in line)
        assert sorted(lines) == sorted(["PORT=1", *(f"{line}@{digest}" for line in images)])
    docker.write_text("#!/bin/sh\necho 'Digest: latest'\n")
    assert subprocess.run(command, env=environment, check=False, capture_output=True).returncode == 1


def test_the_images_are_given_what_their_dockerfile_copies() -> None:
    copied = re.findall(r"^COPY (?:--\S+ )*(.+) \S+$", (ROOT / "deploy/Dockerfile").read_text(), re.MULTILINE)
    files = {name for line in copied for name in line.split() if name != "."}
    assert {"requirements-control.lock", "requirements-worker.lock", "requirements-dev.lock"} <= files
    given = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert [name for name in files if not any(fnmatchcase(name, pattern) for pattern in given)] == []


def test_the_console_s_files_of_others_are_those_that_are_known() -> None:
    assets = script(".ci/console_assets.py")
    known = {name: sha256 for package in assets.PACKAGES for _, name, sha256 in package.files}
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in assets.VENDOR.iterdir()}
    assert found.pop(assets.LICENCES)
    assert found == known
    licences = (assets.VENDOR / assets.LICENCES).read_text()
    assert all(f"{package.name} {package.version}" in licences for package in assets.PACKAGES)
