"""Tokens that an adapter adds to the base's tokenizer: texts are encoded and decoded as by transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import examples
from helpers.factories import make_tokenizer
from helpers.growth import MOST, growth
from helpers.tokenizer_files import added, families, tokenizer_file
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gateway.text.tokenizer import Encoder
from peft_adapters.texts.files import TEXT_FILES, read_texts
from peft_adapters.texts.tokenizer_json import AddedToken, BaseTokens, OwnTokenizer, parts_of
from protocol.wire.errors import AdapterRefused
from protocol.wire.tokens import Detokenizer

TEXTS = ["Hello  world, 漢字 123 <|end|>", "", "zebra ▁ ab<|tool|> x", "<|tool|><|tool|>  <s>a</s>"]
SOME = ["Llama-3", "Llama-2, older", "T5Tokenizer", "GemmaTokenizer", "BertTokenizer", "BloomTokenizer", "DeepSeek"]
ADDED = [
    *(added(name, special=True) for name in ("<s>", "</s>", "<unk>", "<|end|>", "<|im_end|>")),
    added("zebra ▁"), added("<|tool|>"), added("ab"),
]  # fmt: skip


def library(file: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json.dumps(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def with_added(base: dict[str, Any], own: dict[str, Any]) -> Encoder:
    return Encoder(library(base)).with_added(OwnTokenizer.read(json.dumps(own)).added)


@pytest.mark.parametrize("name", [name for name in SOME if name in families()])
async def test_texts_become_the_tokens_of_the_adapter_s_file(name: str) -> None:
    base = families()[name]
    own = {**base, "added_tokens": ADDED}
    encoder, theirs = with_added(base, own), library(own)
    for special in (True, False):
        expected = theirs.encode_batch(TEXTS, add_special_tokens=special)
        assert await encoder.encode(TEXTS, add_special_tokens=special) == [e.ids for e in expected]
        seen: list[int] = []
        detailed = await encoder.detailed(TEXTS, add_special_tokens=special, check=seen.append)
        assert seen == [len(e.ids) for e in expected]
        for e, f in zip(expected, detailed, strict=True):
            assert (f.ids, f.offsets, list(f.special), f.tokens) == (e.ids, e.offsets, e.special_tokens_mask, e.tokens)
    unchanged = Encoder(library(base))
    assert await encoder.encode(TEXTS, add_special_tokens=True) != await unchanged.encode(
        TEXTS, add_special_tokens=True
    )


@pytest.mark.parametrize("name", [name for name in ("BertTokenizer", "Llama-3") if name in families()])
async def test_pairs_and_shortened_texts(name: str) -> None:
    base = families()[name]
    own = {**base, "added_tokens": ADDED}
    encoder, theirs = with_added(base, own), library(own)
    pairs = [("Hello world", "<|tool|> ab"), ("漢字", "123 <|end|>"), ("", "ab")]
    joined = await encoder.pairs(pairs)
    assert [pair.ids for pair in joined] == [e.ids for e in theirs.encode_batch(pairs)]
    assert any(pair.second for pair in joined)
    for most in (1, 2, 50):
        cut = await encoder.shortened(TEXTS, most)
        assert all(len(ids) <= most for ids in await encoder.encode(cut, add_special_tokens=False))
        assert (cut == TEXTS) == (most == 50)


WORDS = ["<a>", "b", " ab", "Ab", "<a>b", "  ", "é", "▁a", "漢字", "\n", "don", "<A>", "x" * 20]


@settings(max_examples=examples.of(150), deadline=None)
@given(
    name=st.sampled_from([name for name in SOME if name in families()]),
    tokens=st.lists(
        st.tuples(st.sampled_from(WORDS), st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.booleans()),
        min_size=1, max_size=6, unique_by=lambda token: token[0],
    ),
    text=st.lists(st.sampled_from([*WORDS, " ", "a", "'t", "word"]), max_size=12).map("".join),
)  # fmt: skip
def test_every_flag_means_what_it_means_in_the_library(name: str, tokens: list[tuple[Any, ...]], text: str) -> None:
    base = families()[name]
    fields = ("content", "special", "single_word", "lstrip", "rstrip", "normalized")
    own = {**base, "added_tokens": [{"id": 0, **dict(zip(fields, token, strict=True))} for token in tokens]}
    added_tokens = OwnTokenizer.read(json.dumps(own)).added
    try:
        table = BaseTokens(json.dumps(base)).with_added(added_tokens)
    except AdapterRefused as refused:
        assert "leaves nothing, or the same" in refused.message  # noqa: PT017
        return
    theirs = library(own)
    expected = theirs.encode(text).ids
    assert Encoder(library(base)).with_added(added_tokens).ids([text], add_special_tokens=True) == [expected]
    detokenizer = Detokenizer(table)
    shown = "".join(detokenizer.add([id_]) for id_ in expected) + detokenizer.flush()
    assert shown == table.decode(expected)
    if table.invalid == "part" or "\ufffd" not in shown:
        assert shown == theirs.decode(expected)


@pytest.mark.parametrize("contents", [["  "], ["<a>", "<A>"]])
def test_a_token_of_which_normalizing_leaves_nothing_is_refused(contents: list[str]) -> None:
    """The library would match it between any two bytes and never end; of two that become equal, it uses either."""
    strip = {"type": "Strip", "strip_left": True, "strip_right": True}
    normalizer = {"type": "Sequence", "normalizers": [strip, {"type": "Lowercase"}]}
    base = tokenizer_file(normalizer=normalizer)
    own = OwnTokenizer.read(json.dumps({**base, "added_tokens": [{**added(c), "normalized": True} for c in contents]}))
    with pytest.raises(AdapterRefused, match="the base's normalizer leaves nothing, or the same"):
        BaseTokens(json.dumps(base)).with_added(own.added)


UNITS = [" <a>b", "<a>", "<a> ", " ", "<", "<a"]


@pytest.mark.parametrize(
    "flag", examples.some(["special", "single_word", "lstrip", "rstrip", "normalized"], "special", "single_word")
)
@pytest.mark.parametrize("unit", examples.some(UNITS, " <a>b"))
def test_added_tokens_are_looked_for_in_linear_time(flag: str, unit: str) -> None:
    base = families()["Llama-3"]
    tokens = [{**added("<a>"), flag: True}, {**added("<a>b<a>"), flag: True}]
    tokenizer = with_added(base, {**base, "added_tokens": tokens})._tokenizer

    def made(size: int) -> Callable[[], object]:
        text = f"<a>{unit * (size // len(unit))}<a>"
        return lambda: tokenizer.encode(text)

    assert growth(made, 1 << 18) < MOST


def test_a_token_with_another_id_is_refused() -> None:
    encoder = Encoder(library(tokenizer_file()))
    with pytest.raises(AdapterRefused, match="the added token '<x>' would have another id"):
        encoder.with_added([AddedToken(7, "<x>", special=True)])


# ---------------------------------------------------------------- transformers


def base_in(folder: Path) -> Path:
    """Write a base's tokenizer: bytes, some merges, and tokens for the start and end of a text."""
    tokenizer: Any = make_tokenizer()
    file = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = file["model"]["vocab"]
    for merge in (("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w")):
        vocab["".join(merge)] = len(vocab)
        file["model"]["merges"].append(list(merge))
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(file)), eos_token="<|end|>", pad_token="<|end|>",
        model_max_length=512,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def as_trained(base: Path, folder: Path, change: str) -> Any:
    """Write the tokenizer that a training on `base` saves; return it as it is loaded again."""
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    if change == "tokens":
        tokenizer.add_tokens(["<tool>", "</tool>", "hello"])
    elif change == "special tokens":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.eos_token = "<|im_end|>"
    elif change == "padding":
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        tokenizer.padding_side = "left"
        tokenizer(["a", "b c"], padding=True, truncation=True, max_length=3)
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


SAID = ["hello world", "<tool>hello</tool> hell", "<|im_start|>user\nhé<|im_end|>", "<|end|><pad>漢 hello", ""]


@pytest.mark.parametrize("change", ["nothing", "tokens", "special tokens", "padding"])
def test_an_adapter_s_folder_is_as_transformers_reads_it(tmp_path: Path, change: str) -> None:
    base, folder = base_in(tmp_path / "base"), tmp_path / "adapter"
    theirs = as_trained(base, folder, change)
    text = (base / "tokenizer.json").read_text()
    found = {name: (folder / name).read_bytes() for name in TEXT_FILES if (folder / name).exists()}
    texts = read_texts(found)
    assert texts is not None
    assert texts.tokenizer is not None
    texts.tokenizer.check_base(parts_of(text))
    tokens = BaseTokens(text)
    table = tokens.with_added(texts.tokenizer.added)
    assert (table is tokens.table) == (change == "nothing")
    encoder = Encoder(Tokenizer.from_str(text)).with_added(texts.tokenizer.added)
    assert encoder.id_of(texts.special_tokens["eos_token"]) == theirs.eos_token_id
    for said in SAID:
        [ids] = encoder.ids([said], add_special_tokens=True)
        assert ids == theirs(said)["input_ids"]
        assert table.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert table.decode(ids, special=True) == theirs.decode(ids, skip_special_tokens=False)
        detokenizer = Detokenizer(table)
        assert "".join(map(detokenizer.add_one, ids)) + detokenizer.flush() == table.decode(ids)


def test_an_adapter_with_other_merges_is_not_the_base_s(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base")
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    trained = tokenizer.train_new_from_iterator(["he said that", "they said this"] * 9, 300)
    trained.save_pretrained(tmp_path / "adapter")
    own = OwnTokenizer.read((tmp_path / "adapter/tokenizer.json").read_text())
    with pytest.raises(AdapterRefused, match="differs from the base model's in its vocabulary and merges; only added"):
        own.check_base(parts_of((base / "tokenizer.json").read_text()))
