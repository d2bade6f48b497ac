"""Stop expressions match as in Python, cost no more than their limits, and cut a text like stop strings."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from contextlib import suppress

import pytest
from helpers import examples
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from protocol.wire.errors import BadRequest
from protocol.wire.regex_syntax import MAX_DEPTH
from protocol.wire.stop_regex import (
    MAX_CHARACTERS,
    MAX_EXPRESSIONS,
    MAX_KNOWN,
    MAX_LINKS,
    MAX_PLACES,
    Automaton,
    checked,
)
from protocol.wire.text import RegexMatcher, overlap

ALPHABET = "abAé_1 \n-"

atoms = st.sampled_from([
    *"abAé1 ", ".", r"\w", r"\W", r"\d", r"\D", r"\s", r"\S", r"\n", r"\x61", r"\u00e9", r"\.", "[ab]", "[^a]",
    "[a-b1]", r"[\w-]", r"[^\s\d]", "[]a]", "[^]a]", r"[A\-b]", "{", "a{", "{}", "-", r"\-", "(?i:a)", "(?i:[^b])",
    "(?s:.)", "É",
])  # fmt: skip
times = st.sampled_from(["", "", "", "*", "+", "?", "*?", "+?", "??", "{2}", "{0}", "{1,}", "{,2}", "{0,3}", "{2,3}?"])


def _compound(inner: st.SearchStrategy[str], times: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    row = st.lists(inner, min_size=1, max_size=3).map("".join)
    either = st.lists(row, min_size=1, max_size=3).map("|".join)
    groups = st.sampled_from(["(", "(?:", "(?i:", "(?s:", "(?is:"])
    return st.tuples(groups, either, times).map(lambda parts: f"{parts[0]}{parts[1]}){parts[2]}")


simple = st.tuples(atoms, times).map("".join)
grouped = simple | _compound(simple, times)
nested = grouped | _compound(grouped, st.sampled_from(["", "?", "{2}", "{0,2}"]))  # more would take long in Python
rows = st.lists(nested, min_size=1, max_size=4).map("".join)
flags = st.sampled_from(["", "", "(?i)", "(?s)", "(?im)"])
expressions = st.tuples(flags, st.lists(rows, min_size=1, max_size=2).map("|".join)).map("".join)
pieces = st.lists(st.text(ALPHABET, max_size=3), max_size=5)


def compiled(expression: str) -> re.Pattern[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FutureWarnings about syntax that may change its meaning
        return re.compile(expression)


def served(given: Sequence[str]) -> list[re.Pattern[str]]:
    """Return the expressions that are served, compiled by Python: without errors and matches of an empty text."""
    patterns: list[re.Pattern[str]] = []
    for expression in given:
        with suppress(re.error):
            patterns.append(compiled(expression))
    return [pattern for pattern in patterns if pattern.fullmatch("") is None]


class SlowMatcher:
    """Equivalent of `RegexMatcher` that searches the whole text after each piece."""

    def __init__(self, stops: Sequence[str], patterns: Sequence[re.Pattern[str]]) -> None:
        self.stops, self.patterns = [stop for stop in stops if stop], patterns
        self.text = ""
        self.matched: str | None = None
        self.begin = 0
        self.ending = ""

    def add(self, text: str) -> None:
        if self.matched is not None:
            return
        self.text += text
        found = [(at, i, stop, stop) for i, stop in enumerate(self.stops) if (at := self.text.find(stop)) >= 0]
        for i, pattern in enumerate(self.patterns, len(self.stops)):
            match = pattern.search(self.text)
            if match is not None:
                ends = range(len(self.text), match.start(), -1)
                end = next(end for end in ends if pattern.fullmatch(self.text, match.start(), end))
                found.append((match.start(), i, pattern.pattern, self.text[match.start() : end]))
        if found:
            self.begin, _, self.matched, self.ending = min(found)


@settings(max_examples=examples.of(100), deadline=None)
@given(st.lists(expressions, min_size=1, max_size=3), st.lists(st.text("ab1 ", max_size=3), max_size=2), pieces)
def test_a_text_ends_where_python_finds_a_match(given: list[str], stops: list[str], texts: list[str]) -> None:
    patterns = served(given)
    assume(patterns)
    slow = SlowMatcher(stops, patterns)
    try:
        matcher = RegexMatcher(stops, [pattern.pattern for pattern in patterns])
    except BadRequest as refusal:
        if "limit" not in refusal.message:
            raise
        return
    shown = ""
    for text in texts:
        shown += matcher.add(text)
        slow.add(text)
        assert (matcher.matched, matcher.ending) == (slow.matched, slow.ending)
    shown += matcher.flush()
    assert shown == (slow.text if slow.matched is None else slow.text[: slow.begin])


@settings(max_examples=examples.of(200), deadline=None)
@given(st.text("ab01{},()[]|*+?.\\^$-dwsbu:P<>im", max_size=9), st.text(ALPHABET + "(){}[]", max_size=6))
def test_what_is_served_is_an_expression_of_python_s(expression: str, text: str) -> None:
    """Expressions that Python refuses are refused, and those that are served have the same meaning."""
    try:
        pattern = compiled(expression)
    except (re.error, OverflowError):
        with pytest.raises(BadRequest):
            Automaton([expression])
        return
    if pattern.fullmatch("") is not None:
        with pytest.raises(BadRequest):
            Automaton([expression])
        return
    try:
        matcher = RegexMatcher([], [expression])
    except BadRequest:
        assert set(expression) & set("^$\\+?{"), "nothing but gaps, references and repetitions may be refused"
        return
    matcher.add(text)
    assert (matcher.matched is not None) == (pattern.search(text) is not None)


gaps = st.sampled_from(["^", "$", r"\A", r"\Z", r"\b", r"\B"])
around = st.tuples(gaps | st.just(""), simple, gaps | st.just("")).map("".join)
with_gaps = st.lists(around | _compound(around, times), min_size=1, max_size=3).map("".join)


@settings(max_examples=examples.of(200), deadline=None)
@given(st.sampled_from(["", "(?m)", "(?i)"]), with_gaps, st.lists(st.text("abA_1 \n", max_size=3), max_size=5))
def test_gaps_are_where_python_has_them_in_the_text_so_far(flag: str, body: str, texts: list[str]) -> None:
    """Without the flag m, the line break before which `$` matches is part of the match, as in `\\n?\\Z`."""
    try:
        matcher = RegexMatcher([], [flag + body])
    except BadRequest as refusal:
        if not any(told in refusal.message for told in ("right after another", "limit", "the empty text")):
            raise
        return
    there = flag + "(?:" + (body if flag == "(?m)" else body.replace("$", r"(?:\n?\Z)")) + ")"
    read = ""
    for text in texts:
        matcher.add(text)
        read += text
        found = compiled(there).search(read)
        assert (matcher.matched is not None) == (found is not None)
        if found is not None:
            ends = range(len(read), found.start() - 1, -1)
            rests = ((end, compiled(there + rf"(?=(?s:.{{{len(read) - end}}})\Z)")) for end in ends)
            end = next(end for end, rest in rests if rest.match(read, found.start()))
            assert matcher.ending == read[found.start() : end]
            return


@pytest.mark.parametrize(
    ("given", "texts", "shown", "ending"),
    [
        (r"[.!?]\s*$", ["Hel", "lo.x", " y!", " z"], ["Hel", "lo.x", " y", ""], "!"),
        (r"[.!?]\s*$", ["Hello", ".\n"], ["Hello", ""], ".\n"),
        (r"a$", ["a", "b"], ["", ""], "a"),
        (r"a$b", ["a", "b"], ["", "ab"], ""),
        (r"^a", ["b", "a"], ["b", "a"], ""),
        (r"(?m)^a", ["b\n", "a"], ["b\n", ""], "a"),
        (r"(?m)^User:$", ["x\nUser", ": y\nUser:\n"], ["x\n", "User: y\n"], "User:"),
        (r"\bend\b", ["bend e", "nds the end", "."], ["bend ", "ends the ", ""], "end"),
        (r"\Bend", ["end bend"], ["end b"], "end"),
    ],
)
def test_a_gap_is_looked_at_with_the_text_so_far(given: str, texts: list[str], shown: list[str], ending: str) -> None:
    matcher = RegexMatcher([], [given])
    assert [matcher.add(text) for text in texts] == shown
    assert matcher.ending == ending


@pytest.mark.parametrize(
    ("given", "texts", "shown", "matched"),
    [
        ([r"\n(User|Human):"], ["Yes", ".\nUs", "er", ": no"], ["Yes", ".", "", ""], r"\n(User|Human):"),
        ([r"\n(User|Human):"], ["Yes", ".\nUs", "ing"], ["Yes", ".", "\nUsing"], None),
        ([r"\d{4}-\d{2}"], ["in 20", "24-1", "2-01"], ["in ", "", ""], r"\d{4}-\d{2}"),
        (["a.*b"], ["x a", "c", "\n", "ab"], ["x ", "", "ac\n", ""], "a.*b"),
        (["b", "abc"], ["a", "bc"], ["", ""], "abc"),
        (["abc", "ab"], ["abc"], [""], "abc"),
        (["(?i)stop"], ["Sto", "P"], ["", ""], "(?i)stop"),
        (["end.{0,3}"], ["the e", "nd"], ["the ", ""], "end.{0,3}"),
    ],
)
def test_what_may_become_a_match_is_held_back(
    given: list[str], texts: list[str], shown: list[str], matched: str | None
) -> None:
    matcher = RegexMatcher([], given)
    assert [matcher.add(text) for text in texts] == shown
    assert matcher.matched == matched
    assert matcher.add("!") == ("" if matched else "!")


@given(st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), pieces)
def test_of_plain_texts_no_more_is_held_back_than_of_stop_strings(stops: list[str], texts: list[str]) -> None:
    matcher, read = RegexMatcher([], stops), ""
    shown = ""
    for text in texts:
        shown += matcher.add(text)
        read += text
        if matcher.matched is not None:
            return
        held = max(overlap(read, stop) for stop in stops)
        assert shown == read[: len(read) - held]


# ---------------------------------------------------------------- limits

REFUSED = [
    ("(", "without its )"), (")", "without its ("), ("[a", "without its ]"), ("a\\", "nothing after it"),
    ("*a", "nothing to repeat"), ("a**", "repetition of a repetition"), ("a{3,2}", "at least more than at most"),
    ("[b-a]", "range"), (r"\x6", "digits"), (r"\U00110000", "digits"), ("(?i-i:a)", "flag"),
    ("(?P<n>a)(?P<n>b)", "name"), ("^", "the empty text"), (r"\b|a", "the empty text"),
    (r"^\bend", "right after another"), (r"(\b|a)*b", "right after another"), (r"(?m)a$^", "right after another"),
    (r"(a)\1", "not supported"), ("a(?=b)", "not supported"), ("(?<!a)b", "not supported"), ("(?>a)", "not supported"),
    ("a++", "possessive"), ("(?x)a", "not supported"), (r"\q", "not supported"), ("a*", "the empty text"),
    ("(|a)", "the empty text"), ("a{0}", "the empty text"),
    ("a" * (MAX_CHARACTERS + 1), f"{MAX_CHARACTERS + 1} characters; the limit is {MAX_CHARACTERS}"),
    (f"a{{{MAX_PLACES + 1}}}", f"{MAX_PLACES + 1} characters and alternatives"),
    ("(((a{999}){999}){999}){999}", f"a million or more characters and alternatives when its repetitions are written "
     f"out; the limit is {MAX_PLACES}"),
    ("(){999999999}a", f"the limit is {MAX_PLACES}"), ("(a?){99}b", f"{MAX_LINKS} pairs"),
    ("(" * (MAX_DEPTH + 1) + "a" + ")" * (MAX_DEPTH + 1), f"nested deeper than {MAX_DEPTH}"),
]  # fmt: skip


@pytest.mark.parametrize(("expression", "told"), REFUSED, ids=[one[0][:20] for one in REFUSED])
def test_what_is_not_served_is_told(expression: str, told: str) -> None:
    with pytest.raises(BadRequest) as refusal:
        checked([expression])
    assert told in refusal.value.message
    assert refusal.value.param == "stop_regex"
    assert "stop_regex" in refusal.value.message
    assert len(refusal.value.message) < 250


def test_expressions_are_counted_together() -> None:
    assert checked(None) == checked([]) == checked("") == checked(["", ""]) == []
    assert checked("a+") == checked(["", "a+"]) == ["a+"]
    assert len(checked(["ab"] * MAX_EXPRESSIONS)) == MAX_EXPRESSIONS
    with pytest.raises(BadRequest, match=f"{MAX_EXPRESSIONS + 1} expressions; the limit is {MAX_EXPRESSIONS}"):
        checked(["ab"] * (MAX_EXPRESSIONS + 1))
    assert checked(["[^a]" * 128] * 2)
    with pytest.raises(BadRequest, match=f"{MAX_CHARACTERS + 1} characters; the limit is {MAX_CHARACTERS}"):
        checked(["[^a]" * 128, "[^a]" * 128, "a"])
    half = f"a{{{MAX_PLACES // 2}}}"
    assert checked([half, half]) == [half, half]
    with pytest.raises(BadRequest, match=f"{MAX_PLACES + 1} characters and alternatives"):
        checked([half, half, "b"])


HOSTILE = {
    "a chain": "a.{510}b",
    "optional parts": "(a?){88}b",
    "nested counts": "((a{1,4}b?){1,4}c?){1,8}d",
    "alternatives": "|".join("ab" for _ in range(170)),
    "gaps": r"(?m)(" + "|".join(rf"\b{a}" for a in "abcdefghijklmnopqrst") + ")+x$",
    "kinds": r"(\w|\d|\s|[^a]){1,60}\D",
    "many classes": "".join(f"[{a}{b}]" for a in "abcdefgh" for b in "ijklmnopqrstuvw")[:MAX_CHARACTERS],
}


@pytest.mark.parametrize("expression", HOSTILE.values(), ids=HOSTILE)
def test_what_is_served_is_small(expression: str) -> None:
    """The work per character depends on these array sizes only, whatever the text."""
    [kept] = checked([expression])
    automaton = Automaton([kept])
    assert automaton.num_places <= MAX_PLACES
    assert len(automaton.links) <= MAX_LINKS
    for code in range(3 * MAX_KNOWN):
        automaton.reading(chr(code))
    assert len(automaton._known) <= MAX_KNOWN


def test_a_counted_part_has_few_links() -> None:
    """Written as nested groups, optional parts link only to the next one."""
    assert len(Automaton(["a.{0,500}b"]).links) < 1600
