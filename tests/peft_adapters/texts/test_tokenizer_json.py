"""An adapter's tokenizer.json: all that transformers writes is served as `tokenizers` does, and bombs are refused."""

from __future__ import annotations

import base64
import copy
import json
from typing import Any

import pytest
from helpers.tokenizer_files import LLAMA_3, added, families, model, tokenizer_file
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from peft_adapters.texts.regexes import regex_cost
from peft_adapters.texts.tokenizer_json import MAX_COMMAS, OwnTokenizer, token_table
from protocol.wire.errors import AdapterRefused
from protocol.wire.tokens import Detokenizer, TokenTable

TEXTS = ["Hello  world, it's 漢字 123\n\n\tdon't!", "", " a b", "<s>x</s> zebra ▁ <|end|>", "é😀\u0301 ㎏"]


def by_decoder() -> list[Any]:
    """Return a family for each decoder that there is, with each kind of model."""
    found = {json.dumps([file["decoder"], file["model"]["type"]]): name for name, file in families().items()}
    return [pytest.param(families()[name], id=name) for name in found.values()]


def load(file: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json.dumps(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read(file: dict[str, Any]) -> OwnTokenizer:
    return OwnTokenizer.read(json.dumps(file))


def test_there_are_families() -> None:
    assert len(families()) > 60
    assert len(by_decoder()) > 10


@pytest.mark.parametrize("name", families())
def test_every_family_encodes_as_before(name: str) -> None:
    file = families()[name]
    theirs, ours = load(file), Tokenizer.from_buffer(read(file).encoding())
    for text in TEXTS:
        for special in (True, False):
            expected, found = (t.encode(text, add_special_tokens=special) for t in (theirs, ours))
            assert (found.ids, found.offsets, found.tokens) == (expected.ids, expected.offsets, expected.tokens)


@pytest.mark.parametrize("file", by_decoder())
def test_tokens_of_every_family_are_known(file: dict[str, Any]) -> None:
    tokenizer, table = load(file), read(file).tokens()
    assert not table.refusal
    decoder = tokenizer.get_added_tokens_decoder()
    assert table.added == {token.content: id_ for id_, token in decoder.items()}
    assert table.special == {id_ for id_, token in decoder.items() if token.special}
    known = {id_ for id_ in range(len(table.pieces)) if tokenizer.id_to_token(id_) is not None}
    assert known == set(range(len(table.pieces))) - table.unknown
    assert tokenizer.id_to_token(len(table.pieces)) is None
    assert token_table(json.dumps(file)) == table


def streamed(table: TokenTable, ids: list[int], sizes: list[int]) -> str:
    detokenizer, shown, at = Detokenizer(table), "", 0
    for size in sizes:
        shown += detokenizer.add(ids[at : at + size])
        at += size
    return shown + detokenizer.add(ids[at:]) + detokenizer.flush()


@pytest.mark.parametrize("file", by_decoder())
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_ids_of_every_family_become_their_text(file: dict[str, Any], data: st.DataObject) -> None:
    """However they are cut into steps, with special tokens, unknown ids and halves of characters among them."""
    tokenizer, table = load(file), read(file).tokens()
    bytes_ = [i for i, piece in enumerate(table.pieces) if table.invalid == "byte" and _is_byte(tokenizer, i)]
    ids = data.draw(st.lists(st.integers(0, len(table.pieces) + 3), max_size=20), label="ids")
    sizes = data.draw(st.lists(st.integers(0, 4), max_size=6), label="sizes")
    runs = _runs(ids, set(bytes_) | table.hidden, table)
    if all(_is_regular(run) for run in runs):
        assert streamed(table, ids, sizes) == tokenizer.decode(ids)
    else:  # `tokenizers` takes back what it has shown of a run, once its bytes turn out to be no text
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
    """Return whether a run of bytes is text, or begins with no character at all."""
    try:
        run.decode()
    except UnicodeDecodeError as error:
        return not run.decode(errors="ignore") and error.start == 0
    return True


@pytest.mark.parametrize("name", families())
def test_a_text_is_shown_no_later_than_by_tokenizers(name: str) -> None:
    file = families()[name]
    tokenizer, table = load(file), read(file).tokens()
    for text in TEXTS:
        stream, detokenizer = DecodeStream(skip_special_tokens=True), Detokenizer(table)
        theirs = ours = ""
        for id_ in tokenizer.encode(text).ids:
            theirs += stream.step(tokenizer, id_) or ""
            ours += detokenizer.add([id_])
            assert table.last is not None or len(ours) >= len(theirs)


def test_bytes_that_are_no_text_after_some_that_are() -> None:
    """What was shown stays; each byte that is no text becomes one mark, as `tokenizers` does where none was shown."""
    file = families()["Llama-2, older"]
    ids = file["model"]["vocab"]
    table = read(file).tokens()
    assert table.decode([ids["<0xE6>"], ids["<0xBC>"], ids["<0xA2>"], ids["<0xE6>"], ids["<0xBC>"]]) == "漢\ufffd\ufffd"


def test_what_tokenizers_never_got_cannot_reach_it() -> None:
    """Fields that are not known, and keys that stand twice, end here."""
    file = tokenizer_file(normalizer={"type": "Lowercase", "surprise": 1}, surprise={"type": "Replace"})
    text = json.dumps(file).replace('"normalizer"', '"normalizer": {"type": "NFC"}, "normalizer"', 1)
    written = json.loads(OwnTokenizer.read(text).encoding())
    assert written["normalizer"] == {"type": "Lowercase"}
    assert "surprise" not in written


def test_older_files_are_read() -> None:
    """Models without a type, and merges as one text."""
    file = tokenizer_file(model={"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}, added_tokens=[])
    assert json.loads(read(file).encoding())["model"]["merges"] == [["a", "b"]]
    assert Tokenizer.from_buffer(read(file).encoding()).encode("ab").ids == [2]


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
REGEX = {"type": "Replace", "pattern": {"Regex": "(?:x+x+)+y"}, "content": ""}
EXPAND = {"type": "Replace", "pattern": {"Regex": "[a-z]"}, "content": "x" * 40}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}


def sequence(name: str, *parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", name: list(parts)}


def nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": "NFC"}
    for _ in range(depth):
        inner = sequence("normalizers", inner)
    return inner


def charsmap(raw: bytes) -> dict[str, Any]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(raw).decode()}


def bpe(**changes: Any) -> dict[str, Any]:
    return {**model("BPE"), **changes}


def template(*single: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"type": "TemplateProcessing", "single": list(single), "pair": [], "special_tokens": {}, **changes}


BOMBS: dict[str, tuple[dict[str, Any], str]] = {
    "doubling": ({"normalizer": sequence("normalizers", *[REPLACE] * 16)}, "128 times longer"),
    "doubling in 22 steps": ({"normalizer": sequence("normalizers", *[REPLACE] * 22)}, "more than 16 components"),
    "doubling bytes": ({"pre_tokenizer": sequence("pretokenizers", *[{"type": "ByteLevel"}] * 8)}, "times longer"),
    "one long replacement": ({"normalizer": EXPAND}, "content has 40 characters"),
    "replacing nothing": ({"normalizer": {**REPLACE, "pattern": {"String": ""}}}, "has 0 characters"),
    "replacing what may be nothing": (
        {"normalizer": sequence("normalizers", *[{**REPLACE, "pattern": {"Regex": "b?"}}] * 6)}, "times longer",
    ),
    "a regex": ({"normalizer": REGEX}, "repeats without bound"),
    "a regex that splits": (
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a|a)*$"}, "behavior": "Isolated", "invert": False}},
        "pre_tokenizer (Split).pattern",
    ),
    "a panic of a decoder": (
        {"decoder": sequence("decoders", {"type": "ByteLevel"}, {**EXPAND, "content": "x"}, REGEX)}, "no decoder needs",
    ),
    "doubling decoders": ({"decoder": sequence("decoders", *[REPLACE] * 8)}, "makes tokens longer"),
    "a decoder behind bytes": (
        {"decoder": sequence("decoders", {"type": "ByteLevel"}, {**REPLACE, "content": "b"})}, "has Replace behind",
    ),
    "stripping the end": (
        {"decoder": {"type": "Strip", "content": "a", "start": 0, "stop": 3}}, "stop is not a number from 0 to 0",
    ),
    "an unknown decoder": ({"decoder": {"type": "CTC"}}, "of the type 'CTC'"),
    "half a decoder": ({"decoder": {"type": "Replace"}}, "has no content, pattern"),
    "an unknown model": ({"model": {"type": "Mystery"}}, "of the type 'Mystery'"),
    "deep sequences": ({"normalizer": nested(6)}, "nested deeper than 4"),
    "wide sequences": ({"normalizer": sequence("normalizers", *[{"type": "NFC"}] * 17)}, "more than 16"),
    "no charsmap": ({"normalizer": charsmap(b"\1")}, "not a charsmap"),
    "a charsmap that ends early": ({"normalizer": charsmap(b"\xff\xff\xff\xff")}, "not a charsmap"),
    "a charsmap that grows": ({"normalizer": charsmap(b"\4\0\0\0abcd" + b"x" * 65 + b"\0")}, "64 bytes of a character"),
    "two charsmaps": (
        {"normalizer": sequence("normalizers", *[charsmap(b"\4\0\0\0abcdx\0")] * 2)}, "more than one Precompiled",
    ),
    "a charsmap that is no text": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "?"}}, "base64"),
    "a text twice": ({"post_processor": template(TEXT, TEXT)}, "repeats a text"),
    "a text that is not there": ({"post_processor": template({"Sequence": {"id": "B", "type_id": 0}})}, "not one of A"),
    "a token that is not there": (
        {"post_processor": template({"SpecialToken": {"id": "<x>", "type_id": 0}})}, "no special token '<x>'",
    ),
    "a token of many ids": (
        {"post_processor": template(special_tokens={"<x>": {"id": "<x>", "ids": [1] * 17, "tokens": ["x"] * 17}})},
        "at most 16",
    ),
    "a large id": ({"model": bpe(vocab={"a": 4_000_000_000})}, "model cannot be read"),
    "a negative id": ({"model": bpe(vocab={"a": -1})}, "model cannot be read"),
    "missing ids": ({"model": bpe(vocab={"a": 1_000_000}, merges=[])}, "leaves 1000000"),
    "an id twice": ({"model": bpe(vocab={"a": 1, "b": 1}, merges=[])}, "gives an id to two tokens"),
    "a long token": ({"model": bpe(vocab={"a" * 1025: 1}, merges=[])}, "model cannot be read"),
    "chance": ({"model": bpe(dropout=0.5)}, "dropout is 0.5"),
    "half a merge": ({"model": bpe(merges=["a"])}, "not two tokens"),
    "a long word": ({"model": {**model("WordPiece"), "max_input_chars_per_word": 10**9}}, "model cannot be read"),
    "an added token twice": ({"added_tokens": [added("x"), added("x", special=True)]}, "has a token twice"),
    "a giant added token": ({"added_tokens": [added("x" * 1025)]}, "tokenizer.json cannot be read"),
    "many added tokens": ({"added_tokens": [added(str(i)) for i in range(16_385)]}, "tokenizer.json cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize(("parts", "said"), BOMBS.values(), ids=BOMBS)
def test_bombs_are_refused_by_name(parts: dict[str, Any], said: str) -> None:
    with pytest.raises(AdapterRefused) as refused:
        read(tokenizer_file(**parts))
    assert said in refused.value.message
    assert refused.value.message.startswith("tokenizer.json")


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
    for reader in (OwnTokenizer.read, token_table):
        with pytest.raises(AdapterRefused, match=said):
            reader(text)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_changed_file_is_served_or_refused(data: st.DataObject) -> None:
    """Whatever stands in a place of a file: either it is refused, or `tokenizers` and the table agree on it."""
    file = copy.deepcopy(families()[data.draw(st.sampled_from(sorted(families())), label="family")])
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
        tokens = read(file).tokens()
    except AdapterRefused:
        return
    assert tokens.decode(range(len(tokens.pieces))) is not None


def test_the_cost_of_regular_expressions() -> None:
    assert regex_cost(LLAMA_3).degree == 2
    assert (regex_cost(r"ab?c{2,3}").shortest, regex_cost(r"ab?c{2,3}").longest) == (3, 5)
    assert regex_cost(r"(?=(\d{3})+(?!\d))").shortest == 0


@pytest.mark.parametrize(
    "pattern",
    [
        "(?:x+x+)+y", "(a|a)*b", "(a*)*", "a?" * 40 + "a" * 40, "(?:a|a){0,30}b", r"(a)\1", r"\g<0>", "(?~x)", ".*" * 5,
        "(", ")", "[", r"\k<a>", "(a?){30}", "(" * 100 + ")" * 100, "a{100000}", "(?(1)a|b)", "(a|ab)*c", "(?=a*)*",
        "x{3}{2,}*", "(|a)+", "(?:a{0,9}){9}", "x" * 40_000, "(?x)(?:x+ #)\n x+)+y", "[" * 10_000, "a++*",
    ],
)  # fmt: skip
def test_regular_expressions_that_cost_too_much_are_refused(pattern: str) -> None:
    with pytest.raises(AdapterRefused):
        regex_cost(pattern)
