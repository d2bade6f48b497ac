"""How requests end: stop tokens, stop strings, lengths, and the same after a request is resumed."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import numpy as np
import pytest
from helpers import examples
from helpers.factories import make_tokenizer
from helpers.tokenizer_files import families
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gpu_worker.planning.request import EngineRequest
from gpu_worker.planning.stop import StopRules
from peft_adapters.texts.tokenizer_json import BaseTokens
from protocol.wire.errors import BadRequest
from protocol.wire.messages import Sampling
from protocol.wire.text import OutputText, StopRule

EOS = 0


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer().backend_tokenizer


def check(
    tokenizer: Tokenizer | None,
    max_new: int = 100,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
) -> StopRules:
    request = EngineRequest(
        "r", 1, "", np.array([5, 6], np.int32), sampling or Sampling(), max_new, stop=[*stop],
        stop_token_ids=[*stop_token_ids],
    )  # fmt: skip
    tokens = BaseTokens(tokenizer.to_str()).table if tokenizer is not None else None
    return StopRules(request, max_new, frozenset({EOS}), tokens)


def feed(stop: StopRules, ids: list[int]) -> tuple[int, str]:
    """Return how many ids were accepted before the end, and the finish reason."""
    for i, token in enumerate(ids, 1):
        finish = stop.add(token)
        if finish:
            return i, finish
    return len(ids), ""


def test_end_of_text_stops_unless_ignored(tokenizer: Tokenizer) -> None:
    assert feed(check(tokenizer), [9, 9, EOS, 9]) == (3, "stop")
    assert feed(check(tokenizer, sampling=Sampling(ignore_eos=True)), [9, EOS, 9]) == (3, "")


def test_stop_tokens_stop_even_if_end_of_text_is_ignored(tokenizer: Tokenizer) -> None:
    stop = check(tokenizer, sampling=Sampling(ignore_eos=True), stop_token_ids=[7])
    assert feed(stop, [EOS, 9, 7, 9]) == (3, "stop")


def test_length_ends_and_a_stop_on_the_last_token_is_a_stop(tokenizer: Tokenizer) -> None:
    assert feed(check(tokenizer, max_new=3), [9, 9, 9, 9]) == (3, "length")
    assert feed(check(tokenizer, max_new=3), [9, 9, EOS]) == (3, "stop")


def test_a_stop_string_across_tokens_stops(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two END three").ids
    stop = check(tokenizer, stop=["nothing", "END"])
    taken, finish = feed(stop, ids)
    assert finish == "stop"
    assert stop.stop == "END"
    assert tokenizer.decode(ids[:taken]) == "one two END"


def test_a_match_across_tokens_stops_and_does_again_after_a_resumption(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two END three").ids
    sampling = Sampling(stop_regex=["nothing", r"t[a-z]o\sE[A-Z]+D"])
    taken, finish = feed(check(tokenizer, sampling=sampling, stop=["three"]), ids)
    assert (tokenizer.decode(ids[:taken]), finish) == ("one two END", "stop")
    for known in range(taken):
        stop = check(tokenizer, sampling=sampling)
        assert feed(stop, ids[:known]) == (known, "")
        assert feed(stop, ids[known:]) == (taken - known, "stop")
        assert stop.stop == sampling.stop_regex[1]


def test_nothing_stops_within_min_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ENDxxxEND").ids
    stop = check(tokenizer, sampling=Sampling(min_tokens=3), stop=["END"], stop_token_ids=[8])
    assert stop.banned().tolist() == [EOS, 8]
    assert feed(stop, ids) == (9, "stop")
    assert not len(stop.banned())
    stop = check(tokenizer, sampling=Sampling(min_tokens=3, stop_regex=["E[A-Z]{2}"]))
    assert feed(stop, ids) == (9, "stop")


@settings(max_examples=examples.of(200), deadline=None)
@given(data=st.data())
def test_gateway_and_worker_end_at_the_same_token(data: st.DataObject) -> None:
    """For any tokenizer, stop rule, special tokens shown by a chat answer, and split into steps."""
    file = data.draw(st.sampled_from(list(families().values())), label="tokenizer")
    tokens = BaseTokens(json.dumps(file)).table
    id_ = st.integers(0, len(tokens.pieces) - 1)
    likely = st.sampled_from([*data.draw(st.lists(id_, min_size=1, max_size=5)), *tokens.special])
    output = data.draw(st.lists(likely | id_, max_size=20), label="output")
    texts = st.text(max_size=3) | likely.map(tokens.text_of)
    expressions = data.draw(st.lists(texts.filter(bool).map(re.escape).map("{}.?[^a]+".format), max_size=2))
    sampling = Sampling(
        min_tokens=data.draw(st.integers(0, 6)), ignore_eos=data.draw(st.booleans()), stop_regex=expressions
    )
    stop = data.draw(st.lists(texts, max_size=3), label="stop")
    end_ids = data.draw(st.lists(likely, max_size=2), label="stop tokens")
    shown = dict.fromkeys(
        data.draw(st.sets(st.sampled_from(sorted(tokens.special)) | likely), label="shown"), "<shown>"
    )
    request = EngineRequest("r", 1, "", np.array([5], np.int32), sampling, 100, stop=stop, stop_token_ids=end_ids)
    worker = StopRules(request, 100, frozenset({EOS}), tokens)
    gateway = OutputText(tokens, StopRule.of(stop, end_ids, sampling, frozenset({EOS})), shown=shown)
    for at, token in enumerate(output, 1):
        finish = worker.add(token)
        gateway.add([token])
        assert (finish == "stop", worker.stop) == (gateway.ended, gateway.stop or "")
        assert gateway.num_tokens == at
        if finish:
            break


def test_stop_strings_without_a_tokenizer_are_refused() -> None:
    with pytest.raises(BadRequest, match=r"tokenizer\.json"):
        check(None, stop=["x"])
    with pytest.raises(BadRequest, match=r"tokenizer\.json"):
        check(None, sampling=Sampling(stop_regex=["x"]))
