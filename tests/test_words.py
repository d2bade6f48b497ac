"""Texts for users have no private words of this project: help, settings, messages, the console, documentation."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorafleet.__main__ import COMMANDS, parser_of
from protocol.runtime.settings import Settings
from tests.lorafleet.test_parser import parsers

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = (
    "adapter_store", "gateway", "gpu_worker", "kernels/lora_kernels", "lorafleet", "peft_adapters", "protocol",
    "scheduler",
)  # fmt: skip
PAGES = sorted(
    str(page.relative_to(ROOT))
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "examples" / "README.md")
)
"""All pages that users or developers read."""

CONSOLE = ROOT / "gateway" / "console"

STANDARD = {
    "whoever": "anyone who, the caller",
    "told": "reported, sent",
    "again and again": "repeatedly",
    "of late": "recent",
    "one by one": "unbatched, one at a time",
    "let go": "release",
    "lets go": "releases",
    "anew": "again",
    "beat": "heartbeat",
    "beats": "heartbeats",
    "put out": "emit",
    "puts out": "emits",
    "spending": "recent tokens",
    "lately": "recently",
    "broke off": "was interrupted",
    "let in": "accepted",
    "lets in": "accepts",
    "goes on": "continues",
    "go on": "continue",
    "nobody": "anonymous, no one",
    "anybody": "anyone",
    "make room": "free space",
    "makes room": "frees space",
    "held against": "compared with",
    "exclude each other": "cannot be used together",
    "does not answer": "is not responding, cannot be reached",
    "too many of": "the limit that was exceeded",
    "put aside": "set aside",
    "found dead": "declared dead",
    "asked as": "endpoint",
    "in advance": "ahead of time, preallocated",
    "taken away": "removed",
    "gone on with": "continued, resumed",
    "left early": "closed early",
    "by way of": "through, with",
    "go together": "be used together",
    "thrown away": "discarded",
    "whose turn it is": "which one is next",
    "all is well": "healthy",
    "what is to be": "what must be",
    "that is asked for": "requested",
    "what it is asked": "its requests",
    "cannot be asked": "cannot be served, is unavailable",
    "of one's own": "its own",
}
"""Private word -> the field's words for it."""

HARD = re.compile("|".join(rf"\b{re.escape(word)}\b" for word in STANDARD), re.IGNORECASE)


def found_in(text: str) -> list[str]:
    """Return each private word in a text, with the words around it and its replacement."""
    line = " ".join(text.split())
    return [
        f"{line[max(0, hit.start() - 30) : hit.end() + 30]!r}: {STANDARD[hit[0].lower()]}"
        for hit in HARD.finditer(line)
    ]


def messages(path: Path) -> Iterator[str]:
    """Yield the strings of a module that are not docstrings: errors, log lines and output of commands."""
    tree = ast.parse(path.read_text())
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docs
            and " " in node.value
        ):
            yield node.value


def test_a_private_word_is_found_in_any_case_and_across_lines() -> None:
    assert found_in("Whoever asks\nagain  and\nagain") != []
    assert found_in("the toldest beating heart: a heartbeat") == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_in_standard_words(command: str) -> None:
    texts = [re.sub(r"--[\w-]+", "", parser.format_whole_help()) for parser in parsers(parser_of([command]))]
    assert len(texts) > 1
    assert [hit for text in texts for hit in found_in(text)] == []


def test_settings_are_described_in_standard_words() -> None:
    described = {name: field.description for name, field in Settings.model_fields.items()}
    assert [name for name, text in described.items() if not text] == []
    assert [(name, hit) for name, text in described.items() for hit in found_in(text or "")] == []


@pytest.mark.parametrize("package", PRODUCT)
def test_messages_are_in_standard_words(package: str) -> None:
    modules = sorted((ROOT / package).rglob("*.py"))
    assert modules
    assert [(path.name, hit) for path in modules for text in messages(path) for hit in found_in(text)] == []


def test_the_console_is_in_standard_words() -> None:
    files = [path for kind in ("js", "html") for path in CONSOLE.rglob(f"*.{kind}") if "vendor" not in path.parts]
    assert len(files) > 10
    assert [(path.name, hit) for path in files for hit in found_in(path.read_text())] == []


MAX_WORDS = 40
"""A longer sentence must be read twice."""


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a page, without code, tables, headings and link addresses."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = "\n".join("" if re.match(r" *\||#|    |!\[", line) else line for line in text.splitlines())
    for block in re.split(r"\n\s*\n|\n(?=(?:- |\d+\. ))", re.sub(r"\]\([^)]*\)", "]", text)):
        yield from re.split(r"(?<=[.!?])\s+(?=[A-Z`*\[(0-9])", " ".join(block.split()))


@pytest.mark.parametrize("page", PAGES)
def test_sentences_of_pages_are_short(page: str) -> None:
    found = list(sentences((ROOT / page).read_text()))
    assert len(found) > 1
    assert [sentence for sentence in found if len(sentence.split()) > MAX_WORDS] == []


@pytest.mark.parametrize("page", PAGES)
def test_pages_for_users_are_in_standard_words(page: str) -> None:
    text = re.sub(r"```.*?```|`[^`]*`", "", (ROOT / page).read_text(), flags=re.DOTALL)
    assert found_in(text) == []
