"""A tokenizer.json: token texts match `tokenizers`, and from an adapter's file only the added tokens are used."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from helpers import examples
from helpers.tokenizer_files import added, families, model, tokenizer_file
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from peft_adapters.texts.tokenizer_json import (
    MAX_ADDED,
    MAX_ADDED_BYTES,
    MAX_COMMAS,
    MAX_NESTING,
    MAX_OWN_ADDED,
    BaseTokens,
    OwnTokenizer,
    parts_of,
)
from protocol.wire.errors import AdapterRefused
from protocol.wire.tokens import Detokenizer, TokenTable

TEXTS = ["Hello  world, it's 漢字 123\n\n\tdon't!", "", " a b", "<s>x</s> zebra ▁ <|end|>", "é😀\u0301 ㎏"]


def by_decoder() -> list[Any]:
    """Return one family for each combination of decoder and model type."""
    found = {json.dumps([file["decoder"], file["model"]["type"]]): name for name, file in families().items()}
    return [pytest.param(families()[name], id=name) for name in found.values()]


def load(file: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json.dumps(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def table_of(file: dict[str, Any]) -> TokenTable:
    return BaseTokens(json.dumps(file)).table


def read(file: dict[str, Any]) -> OwnTokenizer:
    return OwnTokenizer.read(json.dumps(file))


def test_there_are_families() -> None:
    assert len(families()) > 60
    assert len(by_decoder()) > 10


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize("file", by_decoder())
def test_tokens_of_every_family_are_known(file: dict[str, Any]) -> None:
    tokenizer, table = load(file), table_of(file)
    assert not table.refusal
    decoder = tokenizer.get_added_tokens_decoder()
    assert table.added == {token.content: id_ for id_, token in decoder.items()}
    assert table.special == {id_ for id_, token in decoder.items() if token.special}
    known = {id_ for id_ in range(len(table.pieces)) if tokenizer.id_to_token(id_) is not None}
    assert known == set(range(len(table.pieces))) - table.unknown
    assert tokenizer.id_to_token(len(table.pieces)) is None


OTHERS = [
    *(added(name, special=True) for name in ("<s>", "<unk>", "ab", "<|im_end|>")),
    added("▁new x"),
    added("Ġa"),
    added("<|tool|>"),
    added("<pad>", special=True),
]
"""Tokens of the vocabulary and new ones. Of those added by `tokenizer_file`, two become ordinary and two are missing.
"""


@pytest.mark.parametrize("file", by_decoder())
def test_an_adapter_s_tokens_are_the_base_s_and_its_own(file: dict[str, Any]) -> None:
    base, theirs = BaseTokens(json.dumps(file)), {**file, "added_tokens": OTHERS}
    own = read(theirs)
    table, whole = base.with_added(own.added), table_of(theirs)
    assert replace(table, key="") == replace(whole, key="")
    assert table.key not in (base.table.key, whole.key)
    assert base.with_added(read(theirs).added) is table
    assert base.with_added(read(file).added) is base.table
    tokenizer = load(theirs)
    assert {token.content: token.id for token in own.added} == {
        token.content: id_ for id_, token in tokenizer.get_added_tokens_decoder().items()
    }
    for text in ["a <|tool|>ab<|im_end|>", "▁new x Ġa zebra ▁ <|end|></s>"]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert streamed(table, ids, [1] * len(ids)) == tokenizer.decode(ids)


def streamed(table: TokenTable, ids: list[int], sizes: list[int]) -> str:
    detokenizer, shown, at = Detokenizer(table), "", 0
    for size in sizes:
        shown += detokenizer.add(ids[at : at + size])
        at += size
    return shown + detokenizer.add(ids[at:]) + detokenizer.flush()


@pytest.mark.parametrize("file", by_decoder())
@settings(max_examples=examples.of(60), deadline=None)
@given(data=st.data())
def test_ids_of_every_family_become_their_text(file: dict[str, Any], data: st.DataObject) -> None:
    """For any split into steps, with special tokens, unknown ids and incomplete characters."""
    tokenizer, table = load(file), table_of(file)
    bytes_ = [i for i, piece in enumerate(table.pieces) if table.invalid == "byte" and _is_byte(tokenizer, i)]
    ids = data.draw(st.lists(st.integers(0, len(table.pieces) + 3), max_size=20), label="ids")
    sizes = data.draw(st.lists(st.integers(0, 4), max_size=6), label="sizes")
    runs = _runs(ids, set(bytes_) | table.hidden, table)
    if all(_is_regular(run) for run in runs):
        assert streamed(table, ids, sizes) == tokenizer.decode(ids)
    else:  # `tokenizers` retracts text of a run that it has emitted once the bytes prove invalid
        assert len(streamed(table, ids, sizes)) <= len(tokenizer.decode(ids))
    assert streamed(table, ids, sizes) == table.decode(ids)


def _is_byte(tokenizer: Tokenizer, id_: int) -> bool:
    token = tokenizer.id_to_token(id_) or ""
    return token.startswith("<0x") and token != "<0xgg>"


def _runs(ids: list[int], bytes_and_hidden: set[int], table: TokenTable) -> list[bytes]:
    """Return the bytes of each run of byte tokens."""
    runs = [b""]
    for id_ in ids:
        if id_ in table.hidden or id_ >= len(table.pieces):
            continue
        if id_ in bytes_and_hidden:
            runs[-1] += table.pieces[id_]
        else:
            runs.append(b"")
    return runs


def _is_regular(run: bytes) -> bool:
    """Return whether a run of bytes is valid text, or does not even start with a character."""
    try:
        run.decode()
    except UnicodeDecodeError as error:
        return not run.decode(errors="ignore") and error.start == 0
    return True


@pytest.mark.parametrize("name", families())
def test_a_text_is_shown_no_later_than_by_tokenizers(name: str) -> None:
    file = families()[name]
    tokenizer, table = load(file), table_of(file)
    for text in TEXTS:
        stream, detokenizer = DecodeStream(skip_special_tokens=True), Detokenizer(table)
        theirs = ours = ""
        for id_ in tokenizer.encode(text).ids:
            theirs += stream.step(tokenizer, id_) or ""
            ours += detokenizer.add([id_])
            assert table.last is not None or len(ours) >= len(theirs)


def test_bytes_that_are_no_text_after_some_that_are() -> None:
    """Emitted text stays; each invalid byte becomes one U+FFFD, as with `tokenizers` where nothing was emitted."""
    file = families()["Llama-2, older"]
    ids = file["model"]["vocab"]
    table = table_of(file)
    assert table.decode([ids["<0xE6>"], ids["<0xBC>"], ids["<0xA2>"], ids["<0xE6>"], ids["<0xBC>"]]) == "漢\ufffd\ufffd"


# ---------------------------------------------------------------- parts


def sequence(name: str, *parts: Any) -> dict[str, Any]:
    return {"type": "Sequence", name: list(parts)}


@pytest.mark.parametrize("name", families())
def test_a_copy_that_tokenizers_wrote_is_the_same(name: str) -> None:
    file = families()[name]
    own = OwnTokenizer.read(load(file).to_str(pretty=True))
    own.check_base(parts_of(json.dumps(file)))


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPLIT = {"type": "Split", "pattern": {"Regex": "a+"}, "behavior": "Isolated", "invert": False}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
}
BASE = tokenizer_file(
    normalizer={"type": "NFC"},
    pre_tokenizer=sequence("pretokenizers", SPLIT, BYTE_LEVEL),
    post_processor=sequence("processors", BYTE_LEVEL, TEMPLATE),
    decoder=BYTE_LEVEL,
)
WORDS = model("WordLevel")
SAME: dict[str, dict[str, Any]] = {
    "added tokens": {"added_tokens": OTHERS},
    "padding and truncation": {
        "padding": {"strategy": "BatchLongest", "direction": "Left", "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"},
        "truncation": {"max_length": 8, "strategy": "LongestFirst", "direction": "Right", "stride": 0},
    },
    "merges as texts": {"model": {**BASE["model"], "merges": ["a b"]}},
    "defaults of the model": {
        "model": {
            **BASE["model"], "dropout": None, "continuing_subword_prefix": "", "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        },
    },
    "a model without a type": {"model": {key: value for key, value in BASE["model"].items() if key != "type"}},
    "a vocabulary in another order": {
        "model": {**BASE["model"], "vocab": dict(reversed(BASE["model"]["vocab"].items()))},
    },
    "a field without its default": {
        "pre_tokenizer": sequence("pretokenizers", SPLIT, {"type": "ByteLevel", "add_prefix_space": False}),
    },
    "a sequence of one": {"normalizer": sequence("normalizers", {"type": "NFC"})},
    "a sequence in a sequence": {
        "pre_tokenizer": sequence("pretokenizers", sequence("pretokenizers", SPLIT), BYTE_LEVEL),
    },
    "a post-processor that moves offsets": {"post_processor": TEMPLATE},
    "fields that a decoder does not read": {"decoder": {"type": "ByteLevel", "use_regex": False}},
}  # fmt: skip


@pytest.mark.parametrize("parts", SAME.values(), ids=SAME)
def test_what_is_written_otherwise_is_the_same(parts: dict[str, Any]) -> None:
    read({**BASE, **parts}).check_base(parts_of(json.dumps(BASE)))


def test_a_template_that_adds_nothing_is_none() -> None:
    """transformers 5 writes one even if there was none."""
    single, pair = [{"Sequence": {"id": "A", "type_id": 0}}], [{"Sequence": {"id": "B", "type_id": 1}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": single + pair, "special_tokens": {}}
    file = tokenizer_file()
    read({**file, "post_processor": template}).check_base(parts_of(json.dumps(file)))
    with pytest.raises(AdapterRefused, match="post_processor"):
        read({**file, "post_processor": {**template, "pair": pair + single}}).check_base(parts_of(json.dumps(file)))


def test_older_components_are_the_same() -> None:
    older = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True, "str_rep": "▁"}
    pairs = [(older, METASPACE), ({**older, "add_prefix_space": False}, {**METASPACE, "prepend_scheme": "never"})]
    for old, new in pairs:
        file = tokenizer_file("Unigram", pre_tokenizer=new, decoder=new)
        read({**file, "pre_tokenizer": old, "decoder": old}).check_base(parts_of(json.dumps(file)))
    for kind in ("Unigram", "WordPiece", "WordLevel"):
        file = tokenizer_file(kind)
        older = {key: value for key, value in file["model"].items() if key != "type"}
        read({**file, "model": older}).check_base(parts_of(json.dumps(file)))


def bpe(**changes: Any) -> dict[str, Any]:
    return {"model": {**BASE["model"], **changes}}


OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "merges": (bpe(merges=[["a", "b"], ["b", "a"]]), "merges"),
    "merges in another order": (bpe(merges=[]), "merges"),
    "a token more": (bpe(vocab={**BASE["model"]["vocab"], "more": 999}), "vocabulary"),
    "ids": (bpe(vocab={**BASE["model"]["vocab"], "a": 4, "▁a": 6}), "vocabulary"),
    "an unknown token": (bpe(unk_token="<s>"), "model"),
    "bytes for unknown tokens": (bpe(byte_fallback=True), "model"),
    "words": ({"model": WORDS}, "merges and model"),
    "scores": ({"model": model("Unigram")}, "vocabulary, merges and model"),
    "a normalizer": ({"normalizer": {"type": "NFKC"}}, "normalizer"),
    "no normalizer": ({"normalizer": None}, "normalizer"),
    "a pattern": ({"pre_tokenizer": sequence("pretokenizers", {**SPLIT, "pattern": {"Regex": "b+"}}, BYTE_LEVEL)},
                  "pre_tokenizer"),
    "an order": ({"pre_tokenizer": sequence("pretokenizers", BYTE_LEVEL, SPLIT)}, "pre_tokenizer"),
    "a flag": ({"pre_tokenizer": sequence("pretokenizers", SPLIT, {**BYTE_LEVEL, "use_regex": False})},
               "pre_tokenizer"),
    "a space before": ({"pre_tokenizer": sequence("pretokenizers", SPLIT, {**BYTE_LEVEL, "add_prefix_space": True})},
                       "pre_tokenizer"),
    "a template": ({"post_processor": {**TEMPLATE, "single": TEMPLATE["single"][1:]}}, "post_processor"),
    "no template": ({"post_processor": None}, "post_processor"),
    "a decoder": ({"decoder": METASPACE}, "decoder"),
    "no decoder": ({"decoder": None}, "decoder"),
    "nothing but a model": ({"normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None},
                            "normalizer, pre_tokenizer, post_processor and decoder"),
}  # fmt: skip


@pytest.mark.parametrize(("parts", "named"), OTHER.values(), ids=OTHER)
def test_another_tokenizer_is_refused_by_its_parts(parts: dict[str, Any], named: str) -> None:
    with pytest.raises(AdapterRefused) as refused:
        read({**BASE, **parts}).check_base(parts_of(json.dumps(BASE)))
    said = refused.value.message
    assert f"tokenizer.json differs from the base model's in its {named}; only added tokens are served" in said
    assert "remove the file to use the base's tokenizer" in said


def test_a_base_without_a_tokenizer_has_none_to_compare_with() -> None:
    with pytest.raises(AdapterRefused, match="the base model has none"):
        read(BASE).check_base({})


# ---------------------------------------------------------------- limits


def nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": "NFC"}
    for _ in range(depth):
        inner = sequence("normalizers", inner)
    return inner


def lists(depth: int) -> dict[str, Any]:
    inner: Any = 1
    for _ in range(depth):
        inner = [inner]
    return {"type": "NFC", "deep": inner}


BOMBS: dict[str, tuple[dict[str, Any], str]] = {
    "deep sequences": ({"normalizer": nested(MAX_NESTING + 1)}, f"normalizer is nested deeper than {MAX_NESTING}"),
    "deep lists": ({"decoder": lists(MAX_NESTING + 1)}, f"decoder is nested deeper than {MAX_NESTING}"),
    "a large component": ({"normalizer": {"type": "x" * (2 << 20)}}, "normalizer has 20971"),
    "a large setting": ({"model": {**BASE["model"], "more": "x" * (2 << 20)}}, "model.more has 2097"),
    "a large id": (bpe(vocab={"a": 4_000_000_000}), "model cannot be read"),
    "a negative id": (bpe(vocab={"a": -1}), "model cannot be read"),
    "a long token": (bpe(vocab={"a" * 1025: 1}), "model cannot be read"),
    "a merge of three": (bpe(merges=[["a", "b", "c"]]), "model.merges cannot be read"),
    "no vocabulary": ({"model": {"type": "BPE", "merges": []}}, "model cannot be read"),
    "an added token twice": ({"added_tokens": [added("x"), added("x", special=True)]}, "has a token twice"),
    "a giant added token": ({"added_tokens": [added("x" * 1025)]}, "tokenizer.json cannot be read"),
    "a giant id": ({"added_tokens": [added("x", 1 << 40)]}, "tokenizer.json cannot be read"),
    "many added tokens": (
        {"added_tokens": [added(str(i)) for i in range(MAX_ADDED + 1)]}, "tokenizer.json cannot be read",
    ),
    "more than an adapter may": (
        {"added_tokens": [added(str(i)) for i in range(MAX_OWN_ADDED + 1)]}, f"the limit is {MAX_OWN_ADDED}",
    ),
    "much of them": (
        {"added_tokens": [added(f"{i:1000}") for i in range(MAX_ADDED_BYTES // 1000 + 1)]},
        f"the limit is {MAX_ADDED_BYTES}",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("parts", "said"), BOMBS.values(), ids=BOMBS)
def test_bombs_are_refused_by_name(parts: dict[str, Any], said: str) -> None:
    with pytest.raises(AdapterRefused) as refused:
        read({**BASE, **parts})
    assert said in refused.value.message
    assert refused.value.message.startswith("tokenizer.json")


def test_the_largest_that_is_taken_is_read() -> None:
    many = [added(f"<|{i:0>27}|>") for i in range(MAX_OWN_ADDED)]
    own = read({**BASE, "added_tokens": many})
    assert len(own.added) == MAX_OWN_ADDED
    assert BaseTokens(json.dumps(BASE)).with_added(own.added).pieces[-1] == many[-1]["content"].encode()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "cannot be read"),
        ('{"normalizer": ' + '{"a": ' * 100_000, "cannot be read"),
        ("[" + "0," * (MAX_COMMAS + 1) + "0]", f"more than {MAX_COMMAS} values"),
        ('{"model": {"type": "Unigram", "vocab": [["a", NaN]]}}', "cannot be read"),
        ('{"model": {"type": "Unigram", "vocab": [["a", 1e999]]}}', "cannot be read"),
        ('{"model": {"type": "BPE", "vocab": {"\\ud800": 0}, "merges": []}}', "cannot be read"),
        ("", "cannot be read"),
        ("{}", "cannot be read"),
    ],
    ids=["nested lists", "nested objects", "many values", "NaN", "infinity", "half a character", "nothing", "no model"],
)
def test_what_is_no_tokenizer_is_refused(text: str, said: str) -> None:
    for reader in (OwnTokenizer.read, BaseTokens, parts_of):
        with pytest.raises(AdapterRefused, match=said):
            reader(text)


@settings(max_examples=examples.of(300), deadline=None)
@given(st.data())
def test_a_changed_file_is_served_or_refused(data: st.DataObject) -> None:
    """Whatever replaces a part of a file: the file is refused, or its added tokens have texts."""
    base = families()[data.draw(st.sampled_from(sorted(families())), label="family")]
    file = copy.deepcopy(base)
    holder: Any = file
    key: Any = data.draw(st.sampled_from(sorted(file)), label="part")
    while isinstance(holder[key], dict | list) and holder[key] and data.draw(st.booleans(), label="deeper"):
        holder = holder[key]
        key = data.draw(
            st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))), label="key"
        )
    odd = st.none() | st.booleans() | st.integers(-1, 1 << 33) | st.text(max_size=3) | st.floats(allow_nan=False)
    holder[key] = data.draw(
        odd | st.lists(odd, max_size=2) | st.dictionaries(st.text(), odd, max_size=2), label="value"
    )
    try:
        own = read(file)
        own.check_base(parts_of(json.dumps(base)))
    except AdapterRefused:
        return
    tokens = BaseTokens(json.dumps(base)).with_added(own.added)
    assert tokens.decode(range(len(tokens.pieces))) is not None
