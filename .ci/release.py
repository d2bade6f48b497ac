"""Check that a version is the same wherever it is written, and print its section of the changelog.

`python .ci/release.py` checks the version of pyproject.toml, `python .ci/release.py v0.1.0` that of a tag. If all
agree, it prints the release notes; otherwise it prints the differences and exits with 1.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PLACES = {
    "deploy/Dockerfile": r'image\.version="(.+?)"',
    "deploy/helm/lorafleet/Chart.yaml": r'^(?:v|appV)ersion: "?([^"\n]+)"?$',
    "docs/kubernetes.md": r"lorafleet-(?:control|worker):(\S+)",
}
"""File -> pattern of each version in it."""


def differences(root: Path, version: str) -> list[str]:
    """Return the places where a tree has another version, and a missing section of the changelog."""
    package = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    found = {"pyproject.toml": [package]}
    found |= {name: re.findall(pattern, (root / name).read_text(), re.MULTILINE) for name, pattern in PLACES.items()}
    wrong = [f"{name} has {', '.join(have) or 'no version'}" for name, have in found.items() if {*have} != {version}]
    return wrong if notes(root, version) else [*wrong, f"CHANGELOG.md has no section of {version}"]


def notes(root: Path, version: str) -> str:
    """Return a version's section of the changelog without its heading, or "" if there is none."""
    section = re.search(
        rf"^## \[{re.escape(version)}\][^\n]*\n(.*?)(?=^## |\Z)",
        (root / "CHANGELOG.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    return section[1].strip() if section else ""


def main(args: list[str], root: Path = Path(__file__).parent.parent) -> int:
    """Check a tag, or else the package's version; return the exit code."""
    package = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    version = args[0].removeprefix("v") if args else package
    if wrong := differences(root, version):
        print(f"this is not {version}: {'; '.join(wrong)}", file=sys.stderr)
        return 1
    print(notes(root, version))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
