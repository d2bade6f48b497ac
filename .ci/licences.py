"""Write docs/licences.md: the license of every package that Lorafleet needs, from the packages' own metadata.

.venv/bin/python .ci/licences.py        # `make licences`
"""

from __future__ import annotations

import importlib.util
import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

PAGE = Path("docs/licences.md")
LOCKS = {"gateway, scheduler, store": "requirements-control.lock", "worker": "requirements-worker.lock",
         "development": "requirements-dev.lock"}  # fmt: skip
"""The first part of the project that needs a package -> the lock that lists the package."""

PERMISSIVE = (
    "MIT", "MIT-0", "MIT-CMU", "Apache-2.0", "BSD", "BSD-2-Clause", "BSD-3-Clause", "ISC", "PSF-2.0", "Unlicense",
    "0BSD", "Zlib", "HPND", "CC0-1.0", "BSL-1.0", "CNRI-Python", "Python-2.0", "Apache-2.0 WITH LLVM-exception",
)  # fmt: skip
REVIEWED = {
    "certifi": "MPL-2.0: a list of certificates, used as it is",
    "tqdm": "MPL-2.0 and MIT: used as it is",
    "shtab": "MPL-2.0: used as it is",
    "hypothesis": "MPL-2.0: tests only",
    "pathspec": "MPL-2.0: builds the wheel only",
    "fqdn": "MPL-2.0: tests only",
}
"""Reviewed packages without a permissive license, and why each is acceptable."""

_CLASSIFIERS = {
    "Apache Software License": "Apache-2.0", "MIT License": "MIT", "BSD License": "BSD", "ISC License (ISCL)": "ISC",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0", "Python Software Foundation License": "PSF-2.0",
    "The Unlicense (Unlicense)": "Unlicense", "MIT No Attribution License (MIT-0)": "MIT-0",
}  # fmt: skip
_TEXTS = {
    "apache": "Apache-2.0", "apache 2.0": "Apache-2.0", "apache license 2.0": "Apache-2.0", "apache-2": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0", "apache software license": "Apache-2.0", "apache 2": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0", "bsd license": "BSD", "new bsd": "BSD-3-Clause", "mit license": "MIT",
    "3-clause bsd license": "BSD-3-Clause", "bsd 3-clause": "BSD-3-Clause", "the mit license": "MIT",
    "dual license": "",
}  # fmt: skip


def licence_of(found: Distribution) -> str:
    """Return a package's license as an SPDX expression, "" if its metadata has none."""
    if expression := found.metadata.get("License-Expression"):
        return expression
    lines = found.metadata.get_all("Classifier") or ()
    classifiers = [line.split(" :: ")[-1] for line in lines if line.startswith("License ::")]
    named = sorted({_CLASSIFIERS[name] for name in classifiers if name in _CLASSIFIERS})
    text = (found.metadata.get("License") or "").strip()
    short = _TEXTS.get(text.lower(), text if text.splitlines() == [text] and len(text) < 40 else "")
    return " OR ".join(named) if named and (len(named) > 1 or named != ["BSD"] or not short) else short


def is_permissive(expression: str) -> bool:
    """Return whether an SPDX expression requires only permissive licenses; for alternatives, one is enough."""
    alternatives = [part.strip(" ()") for part in re.split(r"\bOR\b", expression)]
    return any(
        part and all(licence.strip(" ()") in PERMISSIVE for licence in re.split(r"\bAND\b", part))
        for part in alternatives
    )


def packages(root: Path = Path()) -> dict[str, str]:
    """Return the part of the project that needs each package, by package name."""
    found: dict[str, str] = {}
    for who, lock in LOCKS.items():
        for name in re.findall(r"^([a-z0-9-]+)==", (root / lock).read_text(), re.MULTILINE):
            found.setdefault(name, "worker" if name == "torch" else who)
    return found


def browser_files(root: Path = Path()) -> list[tuple[str, str, str, str]]:
    """Return the rows of packages that the console sends to browsers, and of those that its tests download."""
    place = root / ".ci" / "console_assets.py"
    spec = importlib.util.spec_from_file_location("console_assets", place)
    assert spec is not None
    assert spec.loader is not None
    assets = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = assets  # dataclasses look up their module
    spec.loader.exec_module(assets)
    shipped = [(one.name, one.licence, "browser", one.remark) for one in assets.PACKAGES]
    return [*shipped, (assets.AXE.name, assets.AXE.licence, "development", f"MPL-2.0: {assets.AXE.remark}")]


def table(root: Path = Path()) -> list[tuple[str, str, str, str]]:
    """Return (package, license, part that needs it, remark) of every installed package, sorted by name."""
    rows: list[tuple[str, str, str, str]] = []
    for name, who in sorted(packages(root).items()):
        try:
            licence = licence_of(distribution(name))
        except PackageNotFoundError:  # it is for another Python version or platform
            continue
        rows.append((name, licence or "unknown", who, REVIEWED.get(name, "")))
    return sorted(rows + browser_files(root))


def main() -> int:
    """Write the page; return the exit code."""
    lines = [
        "# Licences of what we use", "",
        "Made by `make licences` from the packages' own metadata; `tests/deploy/test_supply.py` refuses a package"
        " whose", "licence is unknown, or neither permissive nor looked at. CUDA's libraries, which torch's CUDA build"
        " brings, are under", "NVIDIA's own terms; PyTorch's CPU build has none of them.", "",
        "| package | licence | needed by | remark |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    lines += [f"| {' | '.join(row)} |" for row in table()]
    PAGE.write_text("\n".join([*lines, ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
