"""Look up the images' packages in vulnerability databases: exit code 0 without findings, 1 with some, 2 if unknown.

    build/supply/bin/python .ci/audit.py        # `make audit`

It reads requirements-worker.lock, which includes what both images install, and torch's version from
requirements-dev.lock. A source that does not answer, or does not know a package, proves nothing: exit code 2.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SOURCES = ("pypi", "osv")


def pinned() -> list[str]:
    """Return the packages of the images as name==version."""
    torch = re.findall(r"^torch==.*", Path("requirements-dev.lock").read_text(), re.MULTILINE)
    found = re.findall(r"^([a-z0-9-]+==[^\s\\]+)", Path("requirements-worker.lock").read_text(), re.MULTILINE)
    return [*found, *torch]


def ask(source: str, packages: list[str]) -> tuple[list[dict[str, Any]], str]:
    """Return a source's entry for each package, and its error if it gave no answer."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(packages))
        file.flush()
        command = [
            sys.executable, "-m", "pip_audit", "--vulnerability-service", source, "--disable-pip", "--no-deps",
            "--requirement", file.name, "--format", "json", "--progress-spinner", "off",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout)["dependencies"], ""
    except (json.JSONDecodeError, KeyError):
        return [], (done.stderr.strip().splitlines() or ["no output"])[-1]


def verdict(answers: dict[str, tuple[list[dict[str, Any]], str]]) -> tuple[int, list[str]]:
    """Return the exit code and lines of text, from each source's answer."""
    lines: list[str] = []
    known: set[str] = set()
    everything: set[str] = set()
    bad = False
    for source, (packages, error) in answers.items():
        everything |= {package["name"] for package in packages}
        looked_up = [package for package in packages if "skip_reason" not in package]
        known |= {package["name"] for package in looked_up}
        lines.append(f"{source}: {len(looked_up)} of {len(packages)} packages looked up{error and f' ({error})'}")
        for package in looked_up:
            for advisory in package["vulns"]:
                bad = True
                fixed = ", ".join(advisory["fix_versions"]) or "no version"
                lines.append(f"  {package['name']} {package['version']}: {advisory['id']}, fixed in {fixed}")
    if unknown := everything - known:
        lines.append(f"NOT KNOWN: no source of advisories answered for {len(unknown)} packages")
    elif not known:
        lines.append("NOT KNOWN: no source of advisories answered")
    return 1 if bad else 2 if unknown or not known else 0, lines


def main() -> int:
    """Query the sources; return the exit code."""
    packages = pinned()
    code, lines = verdict({source: ask(source, packages) for source in SOURCES})
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main())
