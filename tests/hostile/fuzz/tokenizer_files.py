"""tokenizer.json of every wrong kind is refused; whatever is taken encodes and decodes within its limits."""

from __future__ import annotations

from typing import Any

from hostile.fuzz import odd
from hostile.fuzz.engine import Target, pure
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from peft_adapters.texts.tokenizer_components import MAX_GROWTH
from peft_adapters.texts.tokenizer_json import OwnTokenizer, token_table
from protocol.wire.errors import AdapterRefused

TEXT = "Hello a b  aaaa 漢😀 <s> don't\n" * 20

MAX_PIECE = 100_000
"""Characters of one token's text, far above what any component may make of it."""

VOCAB = {
    token: number for number, token in enumerate(["<s>", "a", "b", "ab", *sorted(pre_tokenizers.ByteLevel.alphabet())])
}
MODELS: tuple[dict[str, Any], ...] = (
    {"type": "BPE", "vocab": VOCAB, "merges": [["a", "b"]]},
    {"type": "BPE", "vocab": VOCAB, "merges": ["a b"], "byte_fallback": True, "unk_token": "<s>"},
    {"type": "Unigram", "vocab": [[token, -1.0] for token in VOCAB], "unk_id": 0},
    {"type": "WordPiece", "vocab": VOCAB, "unk_token": "<s>", "max_input_chars_per_word": 100,
     "continuing_subword_prefix": "##"},
    {"type": "WordLevel", "vocab": VOCAB, "unk_token": "<s>"},
    {"type": "BPE", "vocab": {**VOCAB, "far": 4_000_000_000}, "merges": []},
    {"type": "BPE", "vocab": {**VOCAB, "far": 900_000}, "merges": []},
    {"type": "BPE", "vocab": VOCAB, "merges": [["a", "nothing"]]},
    {"type": "Unigram", "vocab": [["a", float("1e400")]], "unk_id": 9},
    {"type": "WordLevel", "vocab": {}, "unk_token": "?"},
)  # fmt: skip
PATTERNS = (
    {"String": "a"}, {"String": ""}, {"String": "\0"}, {"Regex": "[a-z]"}, {"Regex": "(?:x+x+)+y"}, {"Regex": "("},
    {"Regex": "(a*)*b"},
    {"Regex": ""}, {"Regex": "(?=a)"}, {"Regex": ".{0,1000}{0,1000}"}, {"Regex": "\\p{L}+|\\s"},
    {"Regex": "(a|b|ab)*c"}, {},
    {"String": "a", "Regex": "b"}, 3,
)  # fmt: skip
KINDS = (
    "Replace", "Sequence", "Lowercase", "NFC", "NFKC", "NFD", "Prepend", "Strip", "StripAccents", "Nmt",
    "BertNormalizer", "ByteLevel",
    "Precompiled", "Metaspace", "Whitespace", "WhitespaceSplit", "Split", "Digits", "Punctuation", "BertPreTokenizer",
    "CharDelimiterSplit", "UnicodeScripts", "FixedLength", "TemplateProcessing", "BertProcessing",
    "RobertaProcessing", "Fuse",
    "ByteFallback", "WordPiece", "BPEDecoder", "CTC", "Nothing",
)  # fmt: skip
FIELDS: dict[str, tuple[Any, ...]] = {
    "pattern": PATTERNS, "content": ("", "a", "aa", "x" * 40, "x" * 5000, "▁", "\0"), "prepend": ("▁", "x" * 400),
    "replacement": ("▁", "", "ab", "😀"), "prepend_scheme": ("always", "never", "first", "x"), "split": (True, False),
    "behavior": ("Isolated", "Removed", "Contiguous", "MergedWithPrevious", "x"), "invert": (True, False, 3),
    "add_prefix_space": (True, False), "trim_offsets": (True,), "use_regex": (True, False), "lowercase": (True,),
    "clean_text": (True,), "handle_chinese_chars": (True,), "strip_accents": (None, True), "individual_digits": (True,),
    "left": (True, False), "right": (True,), "strip_left": (True,), "strip_right": (True,), "start": (0, 1, 1 << 40),
    "stop": (0, 1),
    "precompiled_charsmap": ("", "AAAA", "////" * 50, None), "delimiter": ("a", "", "ab"), "length": (0, 1, 1 << 40),
    "single": ([], [{"Sequence": {"id": "A", "type_id": 0}}], [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * 40),
    "pair": ([], [{"Sequence": {"id": "B", "type_id": 1}}]), "special_tokens": ({}, {"<s>": {"id": "<s>", "ids": [0],
    "tokens": ["<s>"]}}),
    "sep": (["<s>", 0],), "cls": (["<s>", 0],), "prefix": ("##", ""), "cleanup": (True, False), "suffix": ("</w>", ""),
    "pad_token": ("<s>",), "word_delimiter_token": ("|",), "max_length": (5,),
}  # fmt: skip


@st.composite
def components(draw: st.DrawFn, depth: int = 0) -> Any:
    """A normalizer, pre-tokenizer, post-processor or decoder, likely wrong."""
    kind = draw(st.sampled_from(KINDS))
    if kind == "Sequence" and depth < 3:
        name = draw(st.sampled_from(["normalizers", "pretokenizers", "processors", "decoders"]))
        num = draw(st.sampled_from([0, 1, 2, 3, 22]))
        return {
            "type": kind,
            name: [draw(components(depth + 1))] * num if num > 3 else [draw(components(depth + 1)) for _ in range(num)],
        }
    chosen = draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=2))
    fields = {name: draw(st.sampled_from(FIELDS[name])) for name in (*NEEDED.get(kind, ()), *chosen)}
    if draw(st.integers(0, 7)) == 0:
        fields[draw(st.one_of(st.sampled_from(sorted(FIELDS)), odd.texts))] = draw(odd.values)
    return {"type": kind, **fields}


NEEDED = {
    "Replace": ("pattern", "content"), "Prepend": ("prepend",), "Strip": ("strip_left", "strip_right"),
    "Split": ("pattern", "behavior", "invert"),
    "Metaspace": ("replacement", "prepend_scheme", "split"), "ByteLevel": ("add_prefix_space", "trim_offsets",
    "use_regex"),
    "Precompiled": ("precompiled_charsmap",), "Digits": ("individual_digits",), "Punctuation": ("behavior",),
    "BertNormalizer": ("clean_text", "handle_chinese_chars", "strip_accents", "lowercase"),
    "CharDelimiterSplit": ("delimiter",),
    "FixedLength": ("length",), "TemplateProcessing": ("single", "pair", "special_tokens"), "BertProcessing": ("sep",
    "cls"),
    "RobertaProcessing": ("sep", "cls", "trim_offsets", "add_prefix_space"), "WordPiece": ("prefix", "cleanup"),
    "BPEDecoder": ("suffix",),
    "CTC": ("pad_token", "word_delimiter_token", "cleanup"),
}  # fmt: skip
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


@st.composite
def files(draw: st.DrawFn) -> str:
    """A tokenizer.json of likely components, with odd values in it, or damaged."""
    file: dict[str, Any] = {"version": "1.0", "added_tokens": [], "model": dict(draw(st.sampled_from(MODELS)))}
    for part in PARTS:
        file[part] = draw(components()) if draw(st.booleans()) else None
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        token = {
            "id": draw(st.sampled_from([0, 5, 9999, -1, 1 << 40])),
            "content": draw(odd.texts),
            "special": draw(st.booleans()),
        }
        file["added_tokens"].append(
            {**token, "single_word": False, "lstrip": True, "rstrip": False, "normalized": False}
        )
    how = draw(st.sampled_from(["as it is", "as it is", "model", "top", "damaged"]))
    if how == "model":
        names = [*file["model"], "dropout", "unk_token", "byte_fallback", "continuing_subword_prefix"]
        file["model"][draw(st.sampled_from(names))] = draw(odd.wild_values)
    elif how == "top":
        file[draw(st.sampled_from([*file, "truncation", "padding"]))] = draw(odd.wild_values)
    raw = odd.written(file)
    return (draw(odd.damaged(st.just(raw))) if how == "damaged" else raw).decode("utf-8", "replace")


def _check(text: str) -> str:
    try:
        table = token_table(text)
        assert table.refusal or table.decode([]) == ""
    except AdapterRefused as refusal:
        odd.kind_of(refusal)
    try:
        own = OwnTokenizer.read(text)
        table = own.tokens()
    except AdapterRefused as refusal:
        return odd.kind_of(refusal)
    num = min(len(table.pieces), 2000)
    assert len(table.decode(range(-3, num + 3))) <= MAX_PIECE * (num + 6)
    try:
        encoded = Tokenizer.from_buffer(own.encoding()).encode(TEXT)
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        return f"taken, and tokenizers raises {type(error).__name__}"
    assert len(encoded.ids) <= MAX_GROWTH * len(TEXT.encode()) + 200
    return "taken, and encodes"


TARGETS = (Target("tokenizer.json", files(), pure(_check), cost=3.0),)
