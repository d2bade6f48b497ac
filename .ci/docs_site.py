"""Collects the pages of the documentation site, and builds it with MkDocs: `make docs` runs it.

The pages are those of the repository. Links between them are adapted to the site; a link to any other file of the
repository, which is not part of the site, becomes plain text. The API reference is generated from the routes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "docs"
PAGES = BUILD / "pages"
OTHERS = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "measured/running-benchmarks.md",
    "examples/README.md": "examples.md",
}
"""Pages outside `docs/` -> their paths in the site."""

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_CODE = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)

API = """# API reference

Every route of a gateway, from its `/openapi.json`; a running gateway shows the same at `/docs`.

<swagger-ui src="./openapi.json" docExpansion="none" supportedSubmitMethods="[]"/>
"""
"""The page of the API reference."""


def places() -> dict[Path, Path]:
    """Return the files of the site: path in the repository -> path in the site, both relative."""
    docs = [path.relative_to(ROOT) for path in sorted((ROOT / "docs").rglob("*")) if path.is_file()]
    found = {path: path.relative_to("docs") for path in docs}
    return found | {Path(page): Path(place) for page, place in OTHERS.items()}


def moved(text: str, page: Path, known: dict[Path, Path]) -> str:
    """Return a page's text with links adapted to the site. page: its path in the repository."""
    parts = _CODE.split(text)
    for number in range(0, len(parts), 2):  # odd parts are code
        parts[number] = _LINK.sub(lambda link: _moved_link(link, page, known), parts[number])
    return "".join(parts)


def _moved_link(link: re.Match[str], page: Path, known: dict[Path, Path]) -> str:
    image, label, target = link.groups()
    path, hash_sign, anchor = target.partition("#")
    if not path or re.match(r"[a-z]+:", target):
        return link[0]
    place = known.get(Path(os.path.normpath(page.parent / path)))
    if place is None:
        return label
    return f"{image}[{label}]({os.path.relpath(place, known[page].parent)}{hash_sign}{anchor})"


def openapi() -> str:
    """Return the OpenAPI description as JSON, without a running gateway."""
    code = "import json; from gateway.app.access_table import unserved; print(json.dumps(unserved().openapi()))"
    python = sys.argv[1] if len(sys.argv) > 1 else sys.executable
    return subprocess.run([python, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def main() -> int:
    """Build the site into `build/docs/html`; return the exit code of MkDocs, nonzero also on warnings."""
    shutil.rmtree(BUILD, ignore_errors=True)
    known = places()
    for source, place in known.items():
        target = PAGES / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            target.write_text(moved((ROOT / source).read_text(), source, known))
        else:
            shutil.copyfile(ROOT / source, target)
    (PAGES / "openapi.json").write_text(json.dumps(json.loads(openapi()), indent=1))
    (PAGES / "api.md").write_text(API)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(ROOT / "mkdocs.yml")]
    return subprocess.run(command, check=False, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}).returncode


if __name__ == "__main__":
    sys.exit(main())
