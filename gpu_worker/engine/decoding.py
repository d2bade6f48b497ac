"""From a step's logits to tokens: what grammars and stop rules allow, and how far draft tokens were right.

A sequence with g draft tokens (see `speculation.py`) has 1 + g rows of logits, one after the other: of its next token,
and of the token after each draft token, as if that one were right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from gpu_worker.engine.grammars import Grammars
from gpu_worker.engine.sampling import Sampled, SampleRow
from gpu_worker.engine.sequence import Sequence
from protocol.wire.errors import Internal, LorafleetError

Drafts = Mapping[Sequence, list[int]]
"""The draft tokens of each sequence that has any."""

Masks = Mapping[Sequence, np.ndarray]
"""Tokens allowed in each row of each sequence with a grammar: int32 [1 + draft tokens, W], one bit a token."""


def grammar_masks(ready: Iterable[Sequence], drafts: Drafts, grammars: Grammars) -> Masks:
    """Return the tokens that the sequences' grammars allow. The host does this while a GPU computes the logits."""
    guided = [(seq, seq.matcher) for seq in ready if seq.matcher is not None]
    if not guided:
        return {}
    masks = grammars.fill([(matcher, drafts.get(seq, [])) for seq, matcher in guided])
    for (seq, matcher), own in zip(guided, masks, strict=True):
        assert seq.stop_rules is not None
        for i, mask in enumerate(own):
            matcher.settle_ends(mask, seq.stop_rules.banned(i))
    return {seq: own for (seq, _), own in zip(guided, masks, strict=True)}


def sample_rows(ready: Iterable[Sequence], drafts: Drafts, masks: Masks) -> list[SampleRow]:
    """Return what to choose each row's token by, in the order of the logits' rows."""
    rows: list[SampleRow] = []
    for seq in ready:
        assert seq.stop_rules is not None
        draft, own = drafts.get(seq, []), masks.get(seq)
        prompt, num = seq.tokens[: seq.num_prompt], seq.num_output
        output = np.concatenate((seq.output, np.array(draft, np.int32))) if draft else seq.output
        for i in range(len(draft) + 1):
            banned = seq.stop_rules.banned(i) if own is None else ()  # a mask has them already
            mask = None if own is None else own[i]
            rows.append(SampleRow(seq.request.sampling, prompt, output[: num + i], banned, mask))
    return rows


def choice_error(seq: Sequence, is_finite: bool) -> LorafleetError | None:
    """Return why a sequence's chosen token cannot be used, if it cannot; is_finite: of its first row's logits."""
    error = seq.matcher.error if seq.matcher is not None else None
    return error or (None if is_finite else Internal("the model's logits are not finite"))


def accept_tokens(seq: Sequence, draft: list[int], sampled: Sampled, row: int) -> tuple[list[int], str]:
    """Append a sequence's chosen token, and those after it as long as the draft tokens that they follow are right.

    row: the sequence's first row in `sampled`. Returns the tokens, and how they end the request, "" if they do not.
    """
    ids: list[int] = []
    finish = ""
    for i in range(len(draft) + 1):
        if not sampled.finite[row + i]:  # only behind a draft token: the next step finds it in the first row
            break
        token = int(sampled.ids[row + i])
        finish = seq.accept(token)
        ids.append(token)
        if finish or i == len(draft) or token != draft[i]:
            break
    return ids, finish
