"""How requests end: tokens, strings, lengths, and the same after a resumption."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from factories import make_tokenizer
from tokenizers import Tokenizer

from gpu_worker.engine.request import EngineRequest
from gpu_worker.engine.stop import StopRules
from protocol.wire.errors import BadRequest
from protocol.wire.messages import Sampling

EOS = 0


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer().backend_tokenizer


def check(
    tokenizer: Tokenizer | None, max_new: int = 100, sampling: Sampling | None = None, **fields: Any
) -> StopRules:
    request = EngineRequest("r", 1, "", np.array([5, 6], np.int32), sampling or Sampling(), max_new, **fields)
    return StopRules(request, max_new, frozenset({EOS}), tokenizer)


def feed(stop: StopRules, ids: list[int]) -> tuple[int, str]:
    """Return how many ids were taken before the end, and the end."""
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


def test_nothing_stops_within_min_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ENDxxxEND").ids
    stop = check(tokenizer, sampling=Sampling(min_tokens=3), stop=["END"], stop_token_ids=[8])
    assert stop.banned().tolist() == [EOS, 8]
    assert feed(stop, ids) == (9, "stop")
    assert not len(stop.banned())


def test_stop_strings_without_a_tokenizer_are_refused() -> None:
    with pytest.raises(BadRequest, match=r"tokenizer\.json"):
        check(None, stop=["x"])
