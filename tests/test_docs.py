"""Documentation names files that exist, is completely on the site, and has the version of the release."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from helpers.scripts import script

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")])
FOLDERS = (
    "adapter_store", "benchmarks", "chaos", "deploy", "docs", "examples", "gateway", "gpu_worker", "kernels",
    "lorafleet", "peft_adapters", "protocol", "scheduler", "tests",
)  # fmt: skip
_PATH = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+?)(?:::\w+)?`")
_TEST = re.compile(r"`(tests/[\w./-]+\.py)::(\w+)`")
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)(?:#([^)\s]+))?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    text = page.read_text()
    gone = [path for path in _PATH.findall(text) if not (ROOT / path).exists()]
    gone += [target for target, _ in _LINK.findall(text) if not (page.parent / target).exists()]
    assert gone == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_tests_exist(page: Path) -> None:
    named = {(path, name) for path, name in _TEST.findall(page.read_text()) if (ROOT / path).exists()}
    gone = [name for path, name in named if not re.search(rf"\b(def|class) {name}\b", (ROOT / path).read_text())]
    assert gone == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_headings_exist(page: Path) -> None:
    for target, anchor in _LINK.findall(page.read_text()):
        if anchor and target.endswith(".md"):
            headings = re.findall(r"^#+ (.+)$", (page.parent / target).read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_diagrams_keep_their_lines(page: Path) -> None:
    """Mermaid reads one statement per line: a diagram reflowed like a paragraph is an error."""
    first_lines = re.findall(r"^```mermaid\n(.*)$", page.read_text(), re.MULTILINE)
    assert [line for line in first_lines if len(line.split()) > 2] == []


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    pages = {str(place) for place in script(".ci/docs_site.py").places().values() if place.suffix == ".md"} | {"api.md"}
    listed = re.findall(r"^ +- [^:]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == pages


@pytest.mark.parametrize(
    ("page", "text", "wanted"),
    [
        ("README.md", "[a](docs/keys.md#tenants)", "[a](keys.md#tenants)"),
        ("README.md", "[`a`](LICENSE) [b](https://x.y/z)", "`a` [b](https://x.y/z)"),
        ("docs/measured/starts.md", "[a](../../CONTRIBUTING.md) [b](#top)", "[a](../contributing.md) [b](#top)"),
        ("docs/console.md", "![a](images/console-keys.png)", "![a](images/console-keys.png)"),
        ("docs/keys.md", "```\n[a](../LICENSE)\n```\n[a](../LICENSE)", "```\n[a](../LICENSE)\n```\na"),
    ],
)
def test_links_lead_to_places_in_the_site(page: str, text: str, wanted: str) -> None:
    site = script(".ci/docs_site.py")
    assert site.moved(text, Path(page), site.places()) == wanted


def test_all_that_is_released_has_one_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = (ROOT / "deploy/helm/lorafleet/Chart.yaml").read_text()
    assert re.findall(r'^(?:version|appVersion): "?([\d.]+)"?$', chart, re.MULTILINE) == [version, version]
    images = re.findall(r'image\.version="([\d.]+)"', (ROOT / "deploy/Dockerfile").read_text())
    assert images == [version, version]
    assert re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == version
