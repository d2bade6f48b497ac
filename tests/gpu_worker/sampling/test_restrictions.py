"""Allowed tokens, bad words and the logprobs of listed tokens, against transformers' processors in mixed batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessor, NoBadWordsLogitsProcessor, SequenceBiasLogitsProcessor
from transformers.generation.logits_process import SuppressTokensLogitsProcessor

from gpu_worker.engine.decoding import sample_rows
from gpu_worker.planning.request import EngineRequest
from gpu_worker.planning.sequence import Sequence
from gpu_worker.planning.stop import StopRules
from gpu_worker.sampling.adjustment import Adjustment
from gpu_worker.sampling.grammars import words_of
from gpu_worker.sampling.sampling import SampleRow, sample
from protocol.wire.errors import BadRequest
from protocol.wire.messages import Sampling, logprob_record_bytes

VOCAB = 70  # not a multiple of 32
NOTHING = np.zeros(0, np.int32)
PAIR = np.dtype([("id", "<i4"), ("logprob", "<f4")])

ids = st.integers(0, VOCAB - 1)
few = st.integers(0, 3)  # few values, so that the words occur


def processed(processor: LogitsProcessor, output: list[int], logits: torch.Tensor) -> torch.Tensor:
    """Return logits as transformers processes them after the output and a prompt that contains no bad word."""
    text = [VOCAB - 1] * 5 + output
    scores = processor(cast(torch.LongTensor, torch.tensor([text], dtype=torch.long)), logits.clone())  # pyright: ignore[reportArgumentType]
    assert isinstance(scores, torch.Tensor)
    return scores


def row_of(output: list[int], **fields: Any) -> SampleRow:
    """Return a request's row as the engine builds it."""
    wish, output_ids = Sampling(temperature=0.0, **fields), np.array(output, np.int32)
    adjustment = Adjustment.of(wish, NOTHING)
    banned, mask = ((), None) if adjustment is None else adjustment.restricted(output_ids, (), None)
    return SampleRow(wish, output_ids, banned, mask, adjustment)


def may_follow(row: SampleRow) -> set[int]:
    """Return the tokens that can be sampled in a row whose logits are all equal."""
    found: set[int] = set()
    logits = torch.zeros(1, VOCAB)
    while True:
        token = int(sample(logits.clone(), [row]).ids[0])
        if token in found:
            return found
        found.add(token)
        logits[0, token] = -1.0


@given(st.lists(few, max_size=9), st.lists(st.lists(few, min_size=1, max_size=4), min_size=1, max_size=6))
def test_a_bad_word_is_never_completed(output: list[int], words: list[list[int]]) -> None:
    logits = torch.zeros(1, VOCAB)
    expected = processed(NoBadWordsLogitsProcessor(words), output, logits)[0]
    assert may_follow(row_of(output, bad_words=words)) == set((expected == 0).nonzero()[:, 0].tolist())


@given(st.sets(ids, min_size=1), st.lists(st.lists(few, min_size=1, max_size=3), max_size=4), st.lists(few, max_size=5))
def test_allowed_tokens_and_bad_words_together(allowed: set[int], words: list[list[int]], output: list[int]) -> None:
    logits = torch.zeros(1, VOCAB)
    expected = processed(SuppressTokensLogitsProcessor(sorted(set(range(VOCAB)) - allowed)), output, logits)
    expected = processed(NoBadWordsLogitsProcessor(words), output, expected)[0] if words else expected[0]
    left = set((expected == 0).nonzero()[:, 0].tolist())
    row = row_of(output, allowed_token_ids=sorted(allowed), bad_words=words)
    if left:
        assert may_follow(row) == left
    else:
        assert row.mask is not None
        assert not row.mask.any()


@given(st.sets(ids, min_size=1), st.sets(ids), st.sets(ids, min_size=1), st.booleans())
def test_they_narrow_a_grammar_and_what_is_banned(
    allowed: set[int], banned: set[int], grammar: set[int], has_grammar: bool
) -> None:
    adjustment = Adjustment.of(Sampling(allowed_token_ids=sorted(allowed), bad_words=[[5]]), NOTHING)
    assert adjustment is not None
    mask = words_of(grammar, VOCAB) if has_grammar else None
    found, may = adjustment.restricted(NOTHING, [] if has_grammar else sorted(banned), mask)
    assert list(found) == []
    assert may is not None
    bits = np.unpackbits(may.view(np.uint8), bitorder="little")
    wanted = (allowed & grammar if has_grammar else allowed - banned) - {5}
    assert set(bits.nonzero()[0].tolist()) == wanted


def test_each_row_of_a_mixed_batch_has_its_own() -> None:
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(1))
    logits[:, 9] = 50.0  # the token that every row would choose
    rows = [
        row_of([]),
        row_of([], bad_words=[[9]]),
        row_of([3], bad_words=[[3, 9], [4, 8]]),
        row_of([3], bad_words=[[4, 9]]),
        row_of([], allowed_token_ids=[64, 69, 2]),
        row_of([], allowed_token_ids=[8, 9], logit_bias={8: 100.0, 7: 100.0}),
    ]
    second = logits.clone()
    second[:, 9] = -torch.inf
    allowed = max((64, 69, 2), key=lambda id_: float(logits[4, id_]))
    expected = [9, int(second[1].argmax()), int(second[2].argmax()), 9, allowed, 8]
    assert sample(logits.clone(), rows).ids.tolist() == expected
    alone = [int(sample(logits[i : i + 1].clone(), [row]).ids[0]) for i, row in enumerate(rows)]
    assert alone == expected


def test_a_bias_is_that_of_transformers() -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(3))
    bias = {5: 3.5, 60: -2.0, 69: 1.0}
    processor = SequenceBiasLogitsProcessor([[[id_], value] for id_, value in bias.items()])  # pyright: ignore[reportArgumentType]
    expected = processed(processor, [1], logits)
    wish = replace(row_of([1], logit_bias=bias, num_logprobs=4), sampling=Sampling(
        temperature=1.0, seed=1, logit_bias=bias, num_logprobs=4, logprobs_of="choice"
    ))  # fmt: skip
    record = np.frombuffer(sample(logits.clone(), [wish]).logprobs[0][4:], PAIR)
    top = expected[0].log_softmax(-1).topk(4)
    assert record["id"].tolist() == top.indices.tolist()
    assert np.allclose(record["logprob"], top.values.numpy(), atol=1e-6)


def test_a_request_that_wants_nothing_of_this_makes_nothing() -> None:
    plain = Sampling(temperature=0.7, top_p=0.9, seed=3, num_logprobs=2, min_tokens=1, logprob_token_ids=[1, 2])
    assert Adjustment.of(plain, NOTHING) is None
    fields: list[dict[str, Any]] = [
        {"logit_bias": {1: 2.0}}, {"watermark": True}, {"repetition_penalty": 1.1}, {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1}, {"allowed_token_ids": [1]}, {"bad_words": [[1]]},
    ]  # fmt: skip
    for field in fields:
        assert Adjustment.of(Sampling(**field), NOTHING) is not None


# ---------------------------------------------------------------- rows of a sequence


def sequence(prompt: list[int], output: list[int], **fields: Any) -> Sequence:
    request = EngineRequest("r", 1, "", np.array(prompt, np.int32), Sampling(temperature=0.0, **fields), 20, output)
    seq = Sequence(request, 100)
    seq.stop_rules = StopRules(request, 20, frozenset([1]), None)
    for token in output:
        seq.stop_rules.add(token)
    return seq


def test_rows_after_draft_tokens_go_by_these_and_leave_no_trace() -> None:
    seq = sequence([4, 4], [2], bad_words=[[2, 7], [7, 8], [8]], presence_penalty=1.0)
    rows = sample_rows([seq], {seq: [7, 3]}, {})
    assert [sorted(row.banned) for row in rows] == [[7, 8], [8, 8], [8]]
    for row in reversed(rows):
        sample(torch.zeros(1, VOCAB), [row])
    assert seq.adjustment is not None
    counts = seq.adjustment.output_counts(seq.output)
    assert (counts.ids.tolist(), counts.counts.tolist()) == ([2], [1])


def test_a_request_that_leaves_no_token_fails_alone_and_says_why() -> None:
    stuck, other = sequence([4], [], allowed_token_ids=[1], min_tokens=2), sequence([4], [], allowed_token_ids=[1, 5])
    rows = sample_rows([stuck, other], {}, {})
    assert isinstance(stuck.failure, BadRequest)
    assert "allowed_token_ids" in stuck.failure.message
    assert other.failure is None
    assert sample(torch.zeros(2, VOCAB), rows).ids[1] in (1, 5)
    drafted = sequence([4], [], allowed_token_ids=[5], bad_words=[[6, 5]])
    sample_rows([drafted], {drafted: [6]}, {})  # after a draft token that is not allowed, no token need be allowed
    assert drafted.failure is None


# ---------------------------------------------------------------- logprobs of listed tokens


@pytest.mark.parametrize("of", ["model", "choice"])
def test_listed_tokens_have_their_logprobs_in_their_order(of: Any) -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(2))
    listed = [69, 0, 33, 0]
    rows = [
        row_of([], num_logprobs=4, logprob_token_ids=listed, logprobs_of=of),
        row_of([], num_logprobs=2),
        row_of([], num_logprobs=1, logprob_token_ids=[7], allowed_token_ids=[3]),
    ]
    expected = logits.log_softmax(-1)
    result = sample(logits.clone(), rows)
    assert [len(record) for record in result.logprobs] == [logprob_record_bytes(num) for num in (4, 2, 1)]
    first, plain, last = (np.frombuffer(record[4:], PAIR) for record in result.logprobs)
    assert first["id"].tolist() == listed
    assert np.allclose(first["logprob"], expected[0, listed].numpy(), atol=1e-6)
    assert plain["id"].tolist() == expected[1].topk(2).indices.tolist()
    assert last["id"].tolist() == [7]
    assert result.ids[2] == 3
    assert last["logprob"][0] == pytest.approx(float(expected[2, 7]), abs=1e-6)  # of the model's own logits, as in vLLM
