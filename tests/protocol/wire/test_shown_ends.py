"""The text that ends an output is shown if requested, and so are special tokens."""

from __future__ import annotations

from typing import Any

import pytest

from protocol.wire.text import OutputText, StopRule
from protocol.wire.tokens import TokenTable

TOKENS = TokenTable([b"<eos>", b"<mark>", b"a", b"b", b"c"], special=frozenset((0, 1)))
EOS, MARK, A, B, C = range(5)


@pytest.mark.parametrize(
    ("rule", "includes", "shown"),
    [
        ({"stop": ["bc"]}, False, "a"),
        ({"stop": ["bc"]}, True, "abc"),
        ({"stop": ["<mark>"], "with_special": True}, False, "a"),
        ({"stop": ["<mark>"], "with_special": True}, True, "a<mark>"),
        ({"stop": ["<mark>"]}, True, "abc"),
        ({"end_ids": frozenset((C,))}, False, "ab"),
        ({"end_ids": frozenset((C,))}, True, "abc"),
        ({"end_ids": frozenset((EOS,))}, True, "abc"),
        ({"end_ids": frozenset((EOS,)), "with_special": True}, False, "a<mark>bc"),
        ({"end_ids": frozenset((EOS,)), "with_special": True}, True, "a<mark>bc<eos>"),
    ],
)
def test_what_is_shown_at_the_end(rule: dict[str, Any], includes: bool, shown: str) -> None:
    ids = [A, MARK, B, C, EOS]
    whole = OutputText(TOKENS, StopRule(**rule), includes_stop=includes)
    assert whole.add(ids) + whole.finish() == shown
    parts = OutputText(TOKENS, StopRule(**rule), includes_stop=includes)
    assert "".join(parts.add((id_,)) for id_ in ids) + parts.finish() == shown
    worker = OutputText(TOKENS, StopRule(**rule))
    worker.add(ids)
    assert (worker.ended, worker.num_tokens) == (parts.ended, parts.num_tokens) or not worker.ended
