"""Documentation names files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
