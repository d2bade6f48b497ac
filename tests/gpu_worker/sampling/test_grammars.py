"""Grammars over token tables: outputs follow them, and an unusable grammar fails only its own request."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from helpers.tokenizer_files import added, families, tokenizer_file
from jsonschema import Draft202012Validator

from gpu_worker.sampling.grammars import MAX_VOCABULARIES, GrammarMatcher, Grammars
from peft_adapters.texts.tokenizer_json import BaseTokens
from protocol.wire.errors import BadRequest
from protocol.wire.tokens import TokenTable

END = 1  # </s>
SCHEMA = {
    "type": "object",
    "properties": {"ab": {"enum": ["ab ", "漢 a", 'x"é']}, "b": {"type": "integer"}},
    "required": ["ab"],
    "additionalProperties": False,
}
GRAMMAR = json.dumps({"grammars": [{"json_schema": SCHEMA}]})
NO_TOKENS: dict[str, Any] = {"type": "BPE", "vocab": {}, "merges": []}
SERVED = ["T5Tokenizer", "Llama-2, older", "Llama-3", "GemmaTokenizer", "XLMRobertaTokenizer", "T5, older"]


def tokens_of(file: dict[str, Any]) -> TokenTable:
    return BaseTokens(json.dumps(file)).table


@pytest.fixture
def grammars() -> Iterator[Grammars]:
    grammars = Grammars(10, frozenset([END]), 60.0)
    yield grammars
    grammars.close()


def random_output(grammars: Grammars, matcher: GrammarMatcher, rng: np.random.Generator) -> list[int]:
    """Return the ids of a random output, each drawn from the tokens that the grammar allows."""
    ids: list[int] = []
    while not matcher.is_complete:
        [mask] = grammars.fill([(matcher, [])], 60.0)
        assert mask is not None
        matcher.check()
        allowed = np.flatnonzero(np.unpackbits(mask[0].view(np.uint8), bitorder="little"))
        ids.append(int(rng.choice(allowed)))
        matcher.consume(ids[-1])
        matcher.check()
        assert len(ids) < 300
    return ids


@pytest.mark.parametrize("name", SERVED)
def test_outputs_follow_the_grammar(grammars: Grammars, name: str) -> None:
    """For tokenizers of every family, in the text that the adapter's decoder produces."""
    tokens = tokens_of(families()[name])
    valid = Draft202012Validator(SCHEMA)
    for seed in range(20):
        matcher = grammars.make(GRAMMAR, tokens, [], []).result()
        ids = random_output(grammars, matcher, np.random.default_rng(seed))
        assert valid.is_valid(json.loads(tokens.decode(ids))), tokens.decode(ids)
        resumed = grammars.make(GRAMMAR, tokens, ids[:3], []).result()
        for id_ in ids[3:]:
            resumed.consume(id_)
        resumed.check()
        assert resumed.is_complete


@pytest.mark.parametrize("name", ["BertTokenizer", "words"])
def test_tokens_that_begin_a_text_as_none_are_an_error(grammars: Grammars, name: str) -> None:
    """In such a tokenizer every token has one text at the beginning of an output and another one elsewhere."""
    matcher = grammars.make(GRAMMAR, tokens_of(families()[name]), [], []).result()
    grammars.fill([(matcher, [])], 60.0)
    with pytest.raises(BadRequest, match="no token can begin it"):
        matcher.check()


@pytest.mark.parametrize(
    ("file", "grammar"),
    [
        (tokenizer_file(), '{"grammars": [{"lark_grammar": "start: ("}]}'),
        (tokenizer_file(), "no JSON"),
        (
            tokenizer_file(model=NO_TOKENS, added_tokens=[added("<x>", special=True)]),
            GRAMMAR,
        ),
        (tokenizer_file(model=NO_TOKENS, added_tokens=[]), GRAMMAR),
        (tokenizer_file(model={"type": "Unigram", "vocab": [["a", 0.0]] * 9, "unk_id": 0}, added_tokens=[]), GRAMMAR),
    ],
    ids=["syntax", "no JSON", "special tokens alone", "no tokens", "one token nine times"],
)
def test_what_cannot_be_used_fails_one_request(grammars: Grammars, file: dict[str, Any], grammar: str) -> None:
    try:
        matcher = grammars.make(grammar, tokens_of(file), [], []).result()
        [mask] = grammars.fill([(matcher, [])], 60.0)
        matcher.check()
    except BadRequest:
        return
    assert mask is not None
    assert mask.any()


def test_other_failures_of_the_library_fail_one_request(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    """A panic is a BaseException that no `except Exception` sees."""
    panic = type("PanicException", (BaseException,), {})
    for error in (panic("index out of bounds"), TypeError("not a grammar"), MemoryError()):

        def fail(*_: object, error: BaseException = error, **_options: object) -> None:
            raise error

        monkeypatch.setattr("gpu_worker.sampling.grammars.LLMatcher", fail)
        with pytest.raises(BadRequest, match=r"grammar|library"):
            grammars.make(GRAMMAR, tokens_of(tokenizer_file()), [], []).result()


def test_vocabularies_are_made_one_at_a_time_and_kept(grammars: Grammars) -> None:
    tables = [tokens_of(tokenizer_file(added_tokens=[added(str(i))])) for i in range(MAX_VOCABULARIES + 1)]
    ready = threading.Semaphore(0)
    grammars.on_ready = ready.release
    for table in tables:
        grammars.make(GRAMMAR, table, [], [])
    for _ in tables:
        assert ready.acquire(timeout=60)
    kept = [grammars.vocabulary(table) for table in tables[1:]]
    assert [grammars.vocabulary(table) for table in tables[1:]] == kept
    assert grammars.vocabulary(tables[0]) not in kept


def test_steps_go_on_between_two_vocabularies(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    """Building one holds the interpreter lock, so the next waits until its share of time has passed."""
    waited: list[bool] = []
    monkeypatch.setattr(grammars._closed, "wait", lambda timeout: waited.append(timeout > 0))
    for tokens in [tokens_of(tokenizer_file(added_tokens=[added(f"own {i}")])) for i in range(3)]:
        grammars.vocabulary(tokens)  # the next one is requested at once, before that share has passed
    assert waited == [False, True, True]


def test_a_base_without_a_vocabulary_refuses_grammars_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def refuse(*args: object, **_: object) -> None:
        asked.append(args)
        raise ValueError("no tokens")

    monkeypatch.setattr("gpu_worker.sampling.grammars.LLTokenizer", refuse)
    text = json.dumps(tokenizer_file())
    base = Grammars(10, frozenset([END]), 60.0, BaseTokens(text).table, text)
    base.prepare()
    for _ in range(2):
        with pytest.raises(BadRequest, match="no tokens"):
            base.make(GRAMMAR, base._tokens, [], []).result()
    assert len(asked) == 2  # once as a file, once as a list of tokens
    base.close()


def test_a_base_that_the_library_cannot_read_is_served(grammars: Grammars) -> None:
    text = json.dumps(families()["T5Tokenizer"])
    base = Grammars(10, frozenset([END]), 60.0, BaseTokens(text).table, text)
    base.prepare()
    tokens = base._tokens
    assert tokens is not None
    ids = random_output(base, base.make(GRAMMAR, tokens, [], []).result(), np.random.default_rng(0))
    assert Draft202012Validator(SCHEMA).is_valid(json.loads(tokens.decode(ids)))
    base.close()
