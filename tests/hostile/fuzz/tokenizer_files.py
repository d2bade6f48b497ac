"""Invalid tokenizer.json files are refused, and accepted added tokens encode and decode within limits."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from hostile.fuzz import odd
from hostile.fuzz.engine import Target, pure
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from gateway.text.tokenizer import Encoder
from peft_adapters.texts.tokenizer_json import BaseTokens, OwnTokenizer, parts_of
from protocol.wire.errors import AdapterRefused

TEXT = "Hello a b  aaaa 漢😀 <s> don't\n" * 20

MAX_PIECE = 100_000
"""Maximum characters of one token's text, far above what any component produces."""

VOCAB = {
    token: number for number, token in enumerate(["<s>", "a", "b", "ab", *sorted(pre_tokenizers.ByteLevel.alphabet())])
}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
BASES: tuple[dict[str, Any], ...] = (
    {
        "normalizer": {"type": "NFKC"}, "pre_tokenizer": BYTE_LEVEL, "post_processor": None, "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": VOCAB, "merges": [["a", "b"]]}, "added_tokens": [],
    },
    {
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Strip", "strip_left": True, "strip_right": True}, {"type": "Lowercase"},
        ]},
        "pre_tokenizer": METASPACE, "post_processor": None, "decoder": METASPACE,
        "model": {"type": "Unigram", "vocab": [[token, -1.0] for token in VOCAB], "unk_id": 0}, "added_tokens": [],
    },
)  # fmt: skip
CONTENTS = ("a", " ", "  a", "aa", "<s>", "Hello", "漢", "😀", "\n", "▁a", "A", "'t", "don", "\0", "e\u0301", "ﬁ")


@st.composite
def files(draw: st.DrawFn) -> tuple[int, str]:
    """Draw a base's number, and a copy of its file with added tokens, odd values, or damage."""
    number = draw(st.integers(0, len(BASES) - 1))
    file: dict[str, Any] = json.loads(json.dumps(BASES[number]))
    for _ in range(draw(st.integers(0, 6))):
        flags = {name: draw(st.booleans()) for name in ("special", "single_word", "lstrip", "rstrip", "normalized")}
        content = draw(st.sampled_from(CONTENTS) | odd.texts)
        file["added_tokens"].append(
            {"id": draw(st.sampled_from([0, 5, 9999, -1, 1 << 40])), "content": content, **flags}
        )
    how = draw(st.sampled_from(["as it is", "as it is", "as it is", "model", "part", "damaged"]))
    if how == "model":
        names = [*file["model"], "dropout", "unk_token", "byte_fallback", "continuing_subword_prefix"]
        file["model"][draw(st.sampled_from(names))] = draw(odd.wild_values)
    elif how == "part":
        file[draw(st.sampled_from([*file, "truncation", "padding"]))] = draw(odd.wild_values)
    raw = odd.written(file)
    return number, (draw(odd.damaged(st.just(raw))) if how == "damaged" else raw).decode("utf-8", "replace")


@cache
def _base(number: int) -> tuple[BaseTokens, Encoder, dict[str, str]]:
    text = json.dumps(BASES[number])
    return BaseTokens(text), Encoder(Tokenizer.from_str(text)), parts_of(text)


def _check(case: tuple[int, str]) -> str:
    tokens, encoder, parts = _base(case[0])
    try:
        own = OwnTokenizer.read(case[1])
        own.check_base(parts)
        table, mine = tokens.with_added(own.added), encoder.with_added(own.added)
    except AdapterRefused as refusal:
        return odd.kind_of(refusal)
    [ids] = mine.ids([TEXT], add_special_tokens=True)
    assert len(ids) <= 2 * len(TEXT.encode())
    num = len(table.pieces)
    assert len(table.decode([*ids, *range(-3, num + 3)])) <= MAX_PIECE * (len(ids) + num)
    return "taken, with tokens of its own" if own.added else "taken"


TARGETS = (Target("tokenizer.json", files(), pure(_check), cost=3.0),)
