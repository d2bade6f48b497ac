"""From a step's logits to tokens: applies grammars and stop rules, and accepts correct draft tokens.

A sequence with g draft tokens (see `speculation.py`) has 1 + g consecutive rows of logits: for its next token, and for
the token after each draft token, assuming that the draft token is right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from torch import Tensor

from gpu_worker.memory import send
from gpu_worker.planning.sequence import Sequence
from gpu_worker.sampling.grammars import Grammars
from gpu_worker.sampling.sampling import PLAIN, Sampled, SampleRow
from protocol.wire.errors import BadRequest, Internal

Drafts = Mapping[Sequence, list[int]]
"""The draft tokens of each sequence that has any."""

Masks = Mapping[Sequence, np.ndarray]
"""Tokens allowed in each row of each sequence with a grammar: int32 [1 + draft tokens, W], one bit per token."""


def grammar_masks(
    ready: Iterable[Sequence], drafts: Drafts, grammars: Grammars, timeout_s: float
) -> tuple[Masks, set[Sequence]]:
    """Return the grammar masks, and the sequences whose masks are not ready in time.

    The host waits at most `timeout_s` seconds, while a GPU computes the logits.
    """
    guided = [(seq, seq.matcher) for seq in ready if seq.matcher is not None]
    if not guided:
        return {}, set()
    filled = grammars.fill([(matcher, drafts.get(seq, [])) for seq, matcher in guided], timeout_s)
    masks: dict[Sequence, np.ndarray] = {}
    late: set[Sequence] = set()
    for (seq, matcher), own in zip(guided, filled, strict=True):
        if own is None:
            late.add(seq)
            continue
        assert seq.stop_rules is not None
        masks[seq] = own[: 1 + len(drafts.get(seq, []))]
        try:
            for i, mask in enumerate(masks[seq]):
                matcher.settle_ends(mask, seq.stop_rules.banned(i))
        except BaseException as error:  # noqa: BLE001  a request's edge: it fails alone
            seq.failure = error
    return masks, late


def without(logits: Tensor, ready: list[Sequence], drafts: Drafts, late: set[Sequence]) -> Tensor:
    """Return a step's logits [n, V] without the rows of `late`. ready, drafts: still with the late sequences."""
    counts = [1 + len(drafts.get(seq, [])) for seq in ready]
    keep = np.repeat([seq not in late for seq in ready], counts)
    rows = np.concatenate((np.flatnonzero(keep), np.arange(len(keep), len(logits))))
    return logits[send(rows, logits.device)]


def sample_rows(ready: Iterable[Sequence], drafts: Drafts, masks: Masks) -> list[SampleRow]:
    """Return how to sample each row of the logits, in row order."""
    rows: list[SampleRow] = []
    for seq in ready:
        draft = drafts.get(seq, [])
        try:
            rows += _rows_of(seq, draft, masks.get(seq))
        except BaseException as error:  # noqa: BLE001  a request's edge: it fails alone
            seq.failure = error
            rows += [PLAIN] * (len(draft) + 1)
    return rows


def _rows_of(seq: Sequence, draft: list[int], masks: np.ndarray | None) -> list[SampleRow]:
    assert seq.stop_rules is not None
    num, adjustment = seq.num_output, seq.adjustment
    if not draft and masks is None and adjustment is None:  # the most common case
        banned = seq.stop_rules.banned()
        if seq.wants_likeliest and not len(banned):
            return [PLAIN]
        return [SampleRow(seq.request.sampling, seq.output, banned)]
    output = np.concatenate((seq.output, np.array(draft, np.int32))) if draft else seq.output
    rows: list[SampleRow] = []
    for i in range(len(draft) + 1):
        banned = seq.stop_rules.banned(i) if masks is None else ()  # a mask has excluded them already
        mask = None if masks is None else masks[i]
        if adjustment is not None:
            banned, mask = adjustment.restricted(output[: num + i], banned, mask)
            if i == 0 and mask is not None and not mask.any():
                raise BadRequest("allowed_token_ids, bad_words, min_tokens and the output's form leave no token")
        own = adjustment.copy() if adjustment is not None and i else adjustment  # draft tokens may be rejected
        rows.append(SampleRow(seq.request.sampling, output[: num + i], banned, mask, own))
    return rows


def check_choice(seq: Sequence, sampled: Sampled, row: int) -> None:
    """Raise the error for which a sequence's chosen token cannot be used, if any. row: its first row in `sampled`."""
    if seq.failure is not None:
        raise seq.failure
    if seq.matcher is not None:
        seq.matcher.check()
    if row in sampled.failed:
        raise sampled.failed[row]
    if not sampled.finite[row]:
        raise Internal("the model's logits are not finite")


def accept_tokens(seq: Sequence, draft: list[int], sampled: Sampled, row: int) -> tuple[list[int], str]:
    """Append a sequence's chosen token, then those that follow draft tokens, up to the first wrong draft token.

    row: the sequence's first row in `sampled`. Return the tokens, and the finish reason, "" if the request continues.
    """
    if not draft:
        token = sampled.ids.item(row)
        return [token], seq.accept(token)
    ids: list[int] = []
    finish = ""
    for i in range(len(draft) + 1):
        if not sampled.finite[row + i]:  # only after a draft token: the next step finds it in its first row
            break
        token = sampled.ids.item(row + i)
        finish = seq.accept(token)
        ids.append(token)
        if finish or i == len(draft) or token != draft[i]:
            break
    return ids, finish
