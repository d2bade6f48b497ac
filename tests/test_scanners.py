"""Our patterns take linear time on any text, and untrusted JSON is read by one function.

Patterns are found in the modules and tried on texts made from pieces of themselves, which include any text that makes a
pattern restart or backtrack.
"""

from __future__ import annotations

import ast
import importlib
import itertools
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import examples

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("gateway", "protocol", "scheduler", "adapter_store", "peft_adapters")

INLINE = {
    "gateway/grammars/notation.py": "re.escape makes a pattern, and matches none",
    "gateway/tools/grammar.py": "what it splits is a format's own markup",
    "adapter_store/command.py": "names of an operator's own model, on the command line",
    "peft_adapters/targets.py": "a config's pattern is compiled to see whether Python could; RE2 matches it",
    "adapter_store/http.py": "digits of one header, at most fifteen",
}
"""Files that use `re` other than in a constant -> why they do not scan untrusted text that way."""

READERS = {
    "gateway/bodies/json_values.py": "the function itself",
    "gateway/chat/messages.py": "again, for integers beyond 64 bits, what json_values has let pass",
    "gateway/grammars/ebnf.py": "one string of a grammar, without lists and objects",
    "gateway/grammars/structured.py": "a schema in a grammar of `max_grammar_bytes`, in a thread; then held to limits",
    "gateway/text/tokenizer.py": "generation_config.json of the operator's model",
    "gateway/responses/stored.py": "a copy of what was just written",
    "gateway/batches/lines.py": "lines are passed over: no value of a body is made",
    "gateway/bodies/json_outline.py": "a text is passed over in pieces: no value of it is made",
    "gateway/batches/results.py": "an answer of ours, of which all but `usage` is passed over",
    "gateway/anthropic/anthropic_write.py": "arguments in an answer, whose length `max_tokens` bounds",
    "gateway/adapters/memory.py": "answers of the fleet's own store",
    "gateway/books/prometheus.py": "replies of the operator's own Prometheus, of at most 2 MiB, in a thread",
    "gateway/requests/database.py": "a row of ours: an entry of the history, which scripts have bounded",
}
"""Files of the gateway that read JSON other than with `json_values.loads` -> why they may."""

METHODS = frozenset({"fullmatch", "match", "search", "finditer", "findall", "sub", "subn", "split"})

NUM = 4000
"""Characters of a text on which a pattern is tried."""

MOST_S = 0.02
"""CPU time in seconds: a hundred times that of a linear pattern, but less than that of a quadratic one."""


@pytest.fixture(scope="module")
def files() -> dict[str, ast.Module]:
    """Return the parsed modules by path, shared by all tests of this file."""
    paths = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in paths}


def called(node: ast.AST, module: str) -> str:
    """Return the function of a module that a node calls, "" if none."""
    func = node.func if isinstance(node, ast.Call) else None
    is_of = isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name) and func.value.id == module
    return func.attr if is_of and isinstance(func, ast.Attribute) else ""


def test_patterns_are_constants_where_they_can_be_found(files: dict[str, ast.Module]) -> None:
    found: set[str] = set()
    for name, tree in files.items():
        own = {id(node) for one in tree.body if isinstance(one, ast.Assign | ast.AnnAssign) for node in ast.walk(one)}
        own |= {id(node) for one in tree.body if isinstance(one, ast.Expr) for node in ast.walk(one)}
        found |= {name for node in ast.walk(tree) if called(node, "re") and id(node) not in own}
        found |= {name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "re"}
    assert found == INLINE.keys()


def patterns_in(value: object) -> Iterator[re.Pattern[str] | re.Pattern[bytes]]:
    if isinstance(value, re.Pattern):
        yield value
    elif isinstance(value, dict):
        yield from itertools.chain.from_iterable(map(patterns_in, value.values()))
    elif isinstance(value, tuple | list):
        yield from itertools.chain.from_iterable(map(patterns_in, value))


def methods_of(files: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Return the methods called on constants, by the constants' names."""
    found: dict[str, set[str]] = {}
    for tree in files.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in METHODS:
                of = node.value.value if isinstance(node.value, ast.Subscript) else node.value
                if isinstance(of, ast.IfExp):
                    of = of.body
                name = of.id if isinstance(of, ast.Name) else of.attr if isinstance(of, ast.Attribute) else ""
                found.setdefault(name, set()).add(node.attr)
    return found


def applied(pattern: re.Pattern[str], methods: set[str], text: str) -> None:
    """Apply a pattern as its methods do. `match` is repeated at each end of a match until it fails."""
    if "fullmatch" in methods:
        pattern.fullmatch(text)
    if "match" in methods:
        at = 0
        while (found := pattern.match(text, at)) is not None and found.end() > at:
            at = found.end()
    if methods - {"fullmatch", "match"}:
        for _ in pattern.finditer(text):
            pass


def all_patterns(files: dict[str, ast.Module]) -> dict[str, tuple[re.Pattern[str], set[str]]]:
    """Return every pattern that is a module's constant, with the methods called on it, by module and name."""
    found: dict[str, tuple[re.Pattern[str], set[str]]] = {}
    methods = methods_of(files)
    for name, tree in files.items():
        if not any(called(node, "re") for node in ast.walk(tree)):
            continue
        module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
        for constant, value in vars(module).items():
            for i, pattern in enumerate(patterns_in(value)):
                text = pattern.pattern if isinstance(pattern.pattern, str) else pattern.pattern.decode()
                is_text = isinstance(pattern.pattern, str)
                same = re.compile(text, pattern.flags if is_text else pattern.flags & ~re.LOCALE)
                found[f"{name}:{constant}[{i}]"] = same, methods.get(constant, set(METHODS))
    return found


def pieces_of(pattern: str) -> list[str]:
    """Return texts of which a pattern may match a part: its words and marks, and one character of each kind."""
    words = re.findall(r"[A-Za-z_:=<>-]{2,}", pattern)
    marks = re.findall(r"""["'/{}()\[\]<>.:,;=@#%&|*+?!~^$-]""", pattern)
    return [*dict.fromkeys([*words[:6], *marks[:8], "\\", "1", "a", " ", "\n"])]


def texts_for(pattern: str) -> Iterator[str]:
    pieces = pieces_of(pattern)
    for before in ["", *pieces[: 4 if examples.are_many else 1]]:
        for pump in [
            *pieces,
            *(f"\\{piece}" for piece in pieces),
            *map("".join, itertools.permutations(pieces[-5:], 2)),
        ]:
            yield before + pump * (NUM // len(pump))


def test_every_pattern_is_linear_on_pieces_of_itself(files: dict[str, ast.Module]) -> None:
    patterns = all_patterns(files)
    assert len(patterns) > 40, "the test would prove nothing"
    slow: list[str] = []
    for name, (pattern, methods) in patterns.items():
        for text in texts_for(pattern.pattern):
            began_s = time.thread_time()
            applied(pattern, methods, text)
            took_s = time.thread_time() - began_s
            if took_s > MOST_S:
                slow.append(f"{name} takes {took_s:.2f} s for {text[:20]!r}…")
                break
    assert slow == []


@pytest.mark.parametrize("pattern", [r'"(?:[^"\\\n]|\\.)*"', r"\{(\d*)(,?)(\d*)\}", r"\[\^?(?:[^\]\\]|\\.)*\]"])
def test_a_pattern_that_begins_anew_is_found_out(pattern: str) -> None:
    def cpu_s(text: str) -> float:
        began_s = time.thread_time()
        applied(re.compile(pattern), {"search"}, text)
        return time.thread_time() - began_s

    assert any(cpu_s(text) > MOST_S for text in texts_for(pattern))


def reads_json(node: ast.AST) -> bool:
    name = called(node, "json") or called(node, "orjson")
    if name in ("loads", "load", "JSONDecoder"):
        return True
    func = node.func if isinstance(node, ast.Call) else None
    if isinstance(func, ast.Name):
        return func.id in ("from_json", "raw_decode")
    if not isinstance(func, ast.Attribute):
        return False
    is_of_msgspec = func.attr == "decode" and ast.unparse(func.value) == "msgspec.json"
    return is_of_msgspec or func.attr in ("model_validate_json", "validate_json")


def test_json_is_read_by_one_function(files: dict[str, ast.Module]) -> None:
    found = {
        name for name, tree in files.items() if name.startswith("gateway/") and any(map(reads_json, ast.walk(tree)))
    }
    assert found == READERS.keys()
