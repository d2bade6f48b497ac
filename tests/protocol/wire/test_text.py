"""Tokens as text: however tokens are split into steps, the text is the same, and it ends at the same token."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from peft_adapters.texts.tokenizer_json import BaseTokens
from protocol.wire.text import OutputText, StopMatcher, StopRule, overlap
from protocol.wire.tokens import Detokenizer

END = 0
ALPHABET = "ab é😀漢\n"


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer with one token per byte and an end token, id 0: most characters take several tokens."""
    vocab = {"<|end|>": END, **{text: i + 1 for i, text in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


TOKENIZER = byte_tokenizer()
TOKENS = BaseTokens(TOKENIZER.to_str()).table
texts = st.text(ALPHABET, max_size=30)
stops = st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3)


@st.composite
def cuts(draw: st.DrawFn, ids: Sequence[int]) -> list[list[int]]:
    """Split `ids` into steps."""
    at = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=8)))
    return [list(ids[i:j]) for i, j in zip([0, *at], [*at, len(ids)], strict=True)]


def whole_text(ids: Sequence[int], stop: Sequence[str]) -> str:
    """Return the text that a reader of all tokens at once would show."""
    text = TOKENIZER.decode(list(ids))
    places = [at for s in stop if (at := text.find(s)) >= 0]
    return text[: min(places)] if places else text


@given(texts, stops, st.data())
def test_steps_do_not_change_the_text(text: str, stop: list[str], data: st.DataObject) -> None:
    ids = TOKENIZER.encode(text).ids
    if data.draw(st.booleans(), label="cut in a character"):
        ids = ids[: data.draw(st.integers(0, len(ids)), label="length")]
    output = OutputText(TOKENS, StopRule(stop))
    shown = ""
    for step in data.draw(cuts(ids), label="steps"):
        shown += output.add(step)
        assert "\ufffd" not in shown
        assert not any(s in shown for s in stop)
    shown += output.finish()
    # A match is decided at the first token that completes one; among overlapping ones in one step the earliest wins.
    one_by_one = OutputText(TOKENS, StopRule(stop))
    assert shown == "".join(one_by_one.add([id_]) for id_ in ids) + one_by_one.finish()
    assert output.num_tokens == one_by_one.num_tokens
    if len(stop) <= 1:
        assert shown == whole_text(ids, stop)


@given(texts, st.integers(0, 20), st.data())
def test_an_end_token_ends_the_text_after_the_minimum(text: str, min_tokens: int, data: st.DataObject) -> None:
    ids = TOKENIZER.encode(text).ids
    for _ in range(data.draw(st.integers(0, 3), label="end tokens")):
        ids.insert(data.draw(st.integers(0, len(ids)), label="at"), END)
    output = OutputText(TOKENS, StopRule(end_ids=frozenset([END]), min_tokens=min_tokens))
    shown = "".join(output.add(step) for step in data.draw(cuts(ids), label="steps"))
    ended = output.ended
    shown += output.finish()
    at = next((i for i, id_ in enumerate(ids) if id_ == END and i >= min_tokens), len(ids))
    assert shown == TOKENIZER.decode(ids[:at])
    assert ended == (at < len(ids))
    assert output.num_tokens == min(at + 1, len(ids))


def test_a_stop_string_within_the_minimum_does_not_count() -> None:
    ids = TOKENIZER.encode("ab ab").ids
    assert OutputText(TOKENS, StopRule(["ab"])).add(ids) == ""
    output = OutputText(TOKENS, StopRule(["ab"], min_tokens=2))
    assert output.add(ids) == "ab "
    assert output.stop == "ab"
    assert output.ended


def test_special_tokens_inside_are_not_shown() -> None:
    ids = [*TOKENIZER.encode("a").ids, END, *TOKENIZER.encode("b").ids]
    output = OutputText(TOKENS, StopRule())
    assert output.add(ids) + output.finish() == "ab"


@given(texts, stops, st.integers(0, 20), st.booleans(), st.data())
def test_special_tokens_that_are_shown_do_not_change_the_end(
    text: str, stop: list[str], min_tokens: int, ends: bool, data: st.DataObject
) -> None:
    """The gateway shows some special tokens in a chat answer, the worker none: both end it at the same token."""
    ids = TOKENIZER.encode(text).ids
    for _ in range(data.draw(st.integers(0, 4), label="special tokens")):
        ids.insert(data.draw(st.integers(0, len(ids)), label="at"), END)
    rule = StopRule(stop, frozenset([TOKENIZER.encode("b").ids[0]] if ends else []), min_tokens)
    plain = OutputText(TOKENS, rule)
    marked = OutputText(TOKENS, rule, shown={END: "\0"})
    without, shown = "", ""
    for step in data.draw(cuts(ids), label="steps"):
        without += plain.add(step)
        shown += marked.add(step)
        assert (marked.num_tokens, marked.ended, marked.stop) == (plain.num_tokens, plain.ended, plain.stop)
        assert shown.replace("\0", "") == without
    without += plain.finish()
    shown += marked.finish()
    assert shown.replace("\0", "") == without
    if not stop and not ends:
        assert shown.count("\0") == ids.count(END)


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [("a|b", "ab", ""), ("a|b|", "x", "a|b|"), ("|ab", "ab", "|"), ("ca|a|b", "ab", "ca|"), ("a|c|", "ab", "a|c|"),
     ("a|b", "|", "a|b")],
)  # fmt: skip
def test_shown_special_tokens_stand_where_they_came(text: str, stop: str, shown: str) -> None:
    ids = [id_ for c in text for id_ in ([END] if c == "|" else TOKENIZER.encode(c).ids)]
    output = OutputText(TOKENS, StopRule([stop]), shown={END: "|"})
    assert "".join(output.add([id_]) for id_ in ids) + output.finish() == shown


@given(st.lists(st.integers(0, 256), max_size=20))
def test_any_ids_become_their_text(ids: list[int]) -> None:
    detokenizer = Detokenizer(TOKENS)
    assert "".join(detokenizer.add([id_]) for id_ in ids) + detokenizer.flush() == TOKENIZER.decode(ids)


@pytest.mark.parametrize(
    ("stop", "pieces", "shown", "matched"),
    [
        (["end"], ["an e", "n", "d of"], ["an ", "", ""], "end"),
        (["end"], ["an en", "emy"], ["an ", "enemy"], None),
        (["aab"], ["aa", "ab"], ["", "a"], "aab"),
        (["b", "abc"], ["a", "bc"], ["", ""], "abc"),
        (["abc", "ab"], ["abc"], [""], "abc"),
        (["", "x"], ["a", "x"], ["a", ""], "x"),
        ([], ["a", "b"], ["a", "b"], None),
    ],
)
def test_what_may_become_a_stop_string_is_held_back(
    stop: list[str], pieces: list[str], shown: list[str], matched: str | None
) -> None:
    matcher = StopMatcher(stop)
    assert [matcher.add(piece) for piece in pieces] == shown
    assert matcher.matched == matched
    assert matcher.add("!") == ("" if matched else "!")


class SlowMatcher:
    """Equivalent of `StopMatcher` that searches for every stop string in all held text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = [stop for stop in stops if stop]
        self.held = ""
        self.matched: str | None = None

    def add(self, text: str) -> str:
        if self.matched is not None:
            return ""
        buffer = self.held + text
        found = [(at, i) for i, stop in enumerate(self.stops) if (at := buffer.find(stop)) >= 0]
        if found:
            at, i = min(found)
            self.matched, self.held = self.stops[i], ""
            return buffer[:at]
        keep = max((overlap(buffer, stop) for stop in self.stops), default=0)
        self.held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep]


@given(st.lists(st.text("ab", max_size=7), max_size=6), st.lists(st.text("ab", max_size=9), max_size=9))
def test_stop_strings_are_found_as_by_looking_for_each(stop: list[str], pieces: list[str]) -> None:
    matcher, slow = StopMatcher(stop), SlowMatcher(stop)
    for piece in pieces:
        assert matcher.add(piece) == slow.add(piece)
        assert matcher.matched == slow.matched
    assert matcher.flush() == slow.held


class CountingMatcher(StopMatcher):
    """Counts its lookups."""

    num_lookups = 0

    def _begins_one(self, text: str) -> bool:
        self.num_lookups += 1
        return super()._begins_one(text)


@pytest.mark.parametrize("text", ["a" * 5000, ("a" * 1023 + "b") * 5, "ab" * 2500], ids=["run", "misses", "mixed"])
def test_a_character_costs_two_look_ups_whatever_the_stop_strings(text: str) -> None:
    matcher = CountingMatcher(["a" * (1023 - i) + "c" for i in range(64)])
    shown = "".join(matcher.add(text[at : at + 3]) for at in range(0, len(text), 3))
    assert shown + matcher.flush() == text
    assert matcher.num_lookups <= 2 * len(text)
