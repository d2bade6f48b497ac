"""Counts that are kept from token to token are those of the whole text."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.sampling.adjustment import MANY, Adjustment, TokenCounts
from protocol.wire.messages import Sampling

texts = st.lists(st.integers(0, 400), max_size=3 * MANY)


def dict_of(counts: TokenCounts) -> dict[int, int]:
    assert counts.total == counts.counts.sum()
    return dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True))


def expected(*texts: list[int]) -> dict[int, int]:
    ids, counts = np.unique(np.concatenate([np.array(text, np.int32) for text in texts]), return_counts=True)
    return dict(zip(ids.tolist(), counts.tolist(), strict=True))


@given(texts, texts, st.lists(st.integers(0, 3 * MANY), max_size=5))
def test_counts_grow_with_the_text(prompt: list[int], output: list[int], ends: list[int]) -> None:
    adjustment = Adjustment(Sampling(), np.array(prompt, np.int32))
    for end in sorted(min(end, len(output)) for end in ends):
        seen = output[:end]
        assert dict_of(adjustment.output_counts(np.array(seen, np.int32))) == expected(seen)
        assert dict_of(adjustment.text_counts(np.array(seen, np.int32))) == expected(prompt, seen)
