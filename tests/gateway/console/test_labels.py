"""Texts of the console use standard terms; words that only this project would use fail the test."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.console.console_routes import FOLDER

MODULES = sorted(FOLDER.glob("*.js"))

LABELS = {
    "ask": "Send", "asked as": "Endpoint", "begin anew": "New chat", "changes": "Target modules", "deaths":
    "Worker failures", "forget the key": "Sign out", "most tokens": "Max tokens", "orders": "Actions", "read again":
    "Refresh", "took": "Latency", "tokens a second": "Throughput (tokens/s)", "from a place": "Hub / S3 / local path",
    "what operators did": "Audit log", "said": "Message", "place": "Source", "of": "Model",
}  # fmt: skip
"""Private word as a whole label -> standard term."""

PRIVATE = {
    r"\b9\d of 100\b": "p95", r"oldest that waits": "oldest queued", r"found in (a|the) pool": "pool hit rate",
    r"\bnobody's?\b": "anonymous", r"\bwhoever\b": "anyone who", r"\btold\b": "reported", r"\bputs? out\b": "emits",
    r"\blets? go\b": "releases", r"\b(of late|lately)\b": "recently", r"\banew\b": "again", r"\bagain and again\b":
    "repeatedly", r"\b\w+ a (second|minute)\b": "per second, /s", r"\bbeats?\b": "heartbeat", r"\bdoor\b": "header",
    r"\bhow long\b": "seconds", r"\btakes? part\b": "joins", r"\bgoes on\b": "continues", r"\bbooks\b": "accounting",
    r"\bcan ?not be\b": "can't be", r"\bstrangers?\b": "clients",
}  # fmt: skip
"""Pattern of private words within a text -> standard term."""


REGEX = re.compile(r"/(?:\\.|\[[^\]\n]*\]|[^/\\\n\[*])+/[gimsuy]*(?=[.,);\s])")


def literals(code: str) -> Iterator[str]:
    """Yield the strings and templates of a JavaScript module, without the expressions in templates."""
    place = 0
    depth: list[int] = []  # number of open braces in each template's expression
    text = ""
    texts: list[str] = []  # texts of the enclosing templates
    while place < len(code):
        char = code[place]
        if depth and char == "}" and depth[-1] == 0:
            depth.pop()
            text, place = texts.pop() + " ", place + 1
        elif code.startswith("//", place):
            place = code.find("\n", place) % (len(code) + 1)
            continue
        elif char in "\"'":
            found = re.compile(rf"{char}((?:\\.|[^\\{char}])*){char}").match(code, place)
            assert found is not None, code[place : place + 40]
            yield found[1]
            place = found.end()
            continue
        elif (found := REGEX.match(code, place)) and re.search(r"[(,=:\[!&|?]\s*$", code[:place]):  # not a division
            place = found.end()
            continue
        elif char == "`":
            text, place = "", place + 1
        else:
            if depth:
                depth[-1] += {"{": 1, "}": -1}.get(char, 0)
            place += 1
            continue
        while True:  # within a template
            if code[place] == "`":
                yield text
                text, place = "", place + 1
                break
            if code.startswith("${", place):
                texts.append(text)
                depth.append(0)
                place += 2
                break
            text, place = text + code[place], place + 1


def phrases(code: str) -> Iterator[str]:
    """Yield the visible texts of a module: between tags, and in attributes that are shown or read out."""
    for text in literals(code):
        if "<" not in text:
            yield text
            continue
        yield from re.findall(r'(?:aria-label|title|placeholder|label|name)="?([^"=<>]*)"?', text)
        yield from re.sub(r"<[^>]*>", "\n", text).split("\n")


def found_in(code: str) -> list[str]:
    """Return the private words of a module, each with its standard term."""
    found: list[str] = []
    for phrase in phrases(code):
        words = " ".join(phrase.split())
        if (label := words.rstrip(" :…")) and label.lower() in LABELS and label[0].isupper():
            found.append(f"{label!r}: {LABELS[label.lower()]}")
        if " " in words:
            found += [f"{words!r}: {PRIVATE[one]}" for one in PRIVATE if re.search(one, words, re.IGNORECASE)]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_a_module_shows_standard_words(path: Path) -> None:
    code = path.read_text()
    assert found_in(code) == []
    assert path.name in ("route.js", "store.js", "zip.js") or any(" " in phrase for phrase in phrases(code))


def test_private_words_are_found_wherever_they_are_shown() -> None:
    for code in (
        'const a = ["x", "Tokens a second"];', "html`<h2>Deaths</h2>`",
        "html`<p>${one ? html`<b>Read again</b>` : 1}</p>`",
        'html`<button aria-label="Forget the key">x</button>`', "say(`${name} was told of it`);",
        "const b = { title: 'Took', of: (one) => one };", "html`<p>It is 95 of 100 ${a} here</p>`",
    ):  # fmt: skip
        assert found_in(code) != [], code
    assert found_in("// whoever is told again and again\nconst a = 'Latency'; const b = /told \\/ x/.test(c);") == []


def test_every_label_that_is_expected_is_there() -> None:
    shown = {" ".join(phrase.split()) for path in MODULES for phrase in phrases(path.read_text())}
    expected = {
        "Oldest queued", "Throughput", "p95", "Refresh", "Target modules", "Pool hit rate", "Endpoint", "Max tokens",
        "New chat", "Send", "Latency", "Worker failures", "Audit log", "Sign out", "Hub / S3 / local path", "Actions",
        "Time to first token", "KV cache",
    }  # fmt: skip
    assert expected - shown == set()
