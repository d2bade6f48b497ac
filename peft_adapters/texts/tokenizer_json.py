"""A tokenizer.json: its tokens as bytes, and the limits of one that an adapter brings.

The library `tokenizers` runs what a file says, and a file may say: double the text twenty times. So an adapter's file
is read here first, as `tokenizer_components.py` knows it, and what `tokenizers` gets to encode with is written anew
from what was read: no field reaches it that was not checked. Decoding needs no library: `token_table` works out once
what each token adds to a text.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw, Struct

from peft_adapters.texts.tokenizer_components import (
    DECODERS,
    NORMALIZERS,
    POST_PROCESSORS,
    PRE_TOKENIZERS,
    Component,
    check_growth,
    component_list,
    refusal,
    written,
)
from protocol.wire.errors import AdapterRefused
from protocol.wire.tokens import TokenTable

MAX_ENTRIES = 1 << 20
"""Tokens of a vocabulary, and merges; ids are below it."""

MAX_COMMAS = 3 << 20
"""Bounds the values of a file before any is made: two a token, and two a merge, of the largest files there are."""

MAX_ADDED = 16_384
MAX_TOKEN_CHARS = 1_024
MAX_COMPONENT_BYTES = 2 << 20
MAX_AFFIX_CHARS = 16
MAX_WORD_CHARS = 1_000
MAX_MISSING_IDS = 65_536
"""Ids below the largest that are no token, in an adapter's vocabulary."""

_Token = Annotated[str, Meta(max_length=MAX_TOKEN_CHARS)]
_Affix = Annotated[str, Meta(max_length=MAX_AFFIX_CHARS)]
_Id = Annotated[int, Meta(ge=0, lt=MAX_ENTRIES)]
_Ids = Annotated[dict[_Token, _Id], Meta(max_length=MAX_ENTRIES)]
_Merges = Annotated[list[str | tuple[str, str]], Meta(max_length=MAX_ENTRIES)]
_Scores = Annotated[list[tuple[_Token, float]], Meta(max_length=MAX_ENTRIES)]


class Bpe(Struct, tag="BPE"):
    """Byte pair encoding."""

    vocab: _Ids
    merges: _Merges
    dropout: float | None = None
    unk_token: _Token | None = None
    continuing_subword_prefix: _Affix | None = None
    end_of_word_suffix: _Affix | None = None
    fuse_unk: bool = False
    byte_fallback: bool = False
    ignore_merges: bool = False


class Unigram(Struct, tag=True):
    """SentencePiece's model of tokens and their scores."""

    vocab: _Scores
    unk_id: _Id | None = None
    byte_fallback: bool = False


class WordPiece(Struct, tag=True):
    """BERT's longest match within words."""

    vocab: _Ids
    unk_token: _Token = "[UNK]"
    continuing_subword_prefix: _Affix = "##"
    max_input_chars_per_word: Annotated[int, Meta(ge=0, le=MAX_WORD_CHARS)] = 100


class WordLevel(Struct, tag=True):
    """Whole words."""

    vocab: _Ids
    unk_token: _Token = "<unk>"


Model = Bpe | Unigram | WordPiece | WordLevel


class _Vocabulary(Struct):
    """The tokens of a model that maps tokens to ids. Its merges, which take as long to read, are left unread."""

    vocab: _Ids


class Added(Struct):
    """A token beside the model's vocabulary, or one of it that is looked for as a whole."""

    id: int
    content: _Token
    special: bool
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True


class _File(Struct):
    model: Raw
    added_tokens: Annotated[list[Added], Meta(max_length=MAX_ADDED)] = []
    normalizer: Raw = Raw(b"null")
    pre_tokenizer: Raw = Raw(b"null")
    post_processor: Raw = Raw(b"null")
    decoder: Raw = Raw(b"null")


class _Type(Struct):
    """What tells a model's kind; files of before 2020 do not name it."""

    type: str = ""
    merges: Raw = Raw()
    unk_id: Raw = Raw()
    max_input_chars_per_word: Raw = Raw()


@dataclass(frozen=True, slots=True)
class OwnTokenizer:
    """An adapter's tokenizer, checked."""

    key: str
    _model: Model
    _added: list[Added]
    _normalizer: list[Component]
    _pre_tokenizer: list[Component]
    _post_processor: list[Component]
    _decoding: _Decoding

    @classmethod
    def read(cls, text: str | bytes) -> OwnTokenizer:
        """Read and check a tokenizer.json. Raises AdapterRefused with the component that is over its limit."""
        file = _read(text)
        normalizer = component_list(_value(file.normalizer, "normalizer"), "normalizer", NORMALIZERS)
        pre_tokenizer = component_list(_value(file.pre_tokenizer, "pre_tokenizer"), "pre_tokenizer", PRE_TOKENIZERS)
        post_processor = component_list(
            _value(file.post_processor, "post_processor"), "post_processor", POST_PROCESSORS
        )
        check_growth([*normalizer, *pre_tokenizer])
        decoding = _decoding(_value(file.decoder, "decoder"))
        model = _model(file)
        _check_own(model, file.added_tokens)
        return cls(key_of(text), model, file.added_tokens, normalizer, pre_tokenizer, post_processor, decoding)

    def tokens(self) -> TokenTable:
        """Return the tokens. Takes a second for a large vocabulary. Raises AdapterRefused."""
        table = _table(self._model, self._added, self._decoding)
        table.key = self.key
        return table

    def id_of(self, token: str) -> int | None:
        """Return a token's id, None if there is no such token."""
        ids = _ids(self._model)
        return _given_ids(self._added, ids, len(self._model.vocab)).get(token, ids.get(token))

    def encoding(self) -> bytes:
        """Return a tokenizer.json that encodes as this one does, and cannot decode."""
        file = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self._added,
            "normalizer": written(self._normalizer, "normalizers"),
            "pre_tokenizer": written(self._pre_tokenizer, "pretokenizers"),
            "post_processor": written(self._post_processor, "processors"),
            "decoder": None,
            "model": self._model,
        }
        return msgspec.json.encode(file)


def token_table(text: str) -> TokenTable:
    """Return the tokens of any tokenizer.json. Raises AdapterRefused if it cannot be read."""
    file = _read(text)
    try:
        decoding, problem = _decoding(_value(file.decoder, "decoder")), ""
    except AdapterRefused as error:
        decoding, problem = _Decoding([]), f"tokens of this model cannot be decoded: {error.message}"
    model = _parsed(file.model, Unigram if _kind(file) == "Unigram" else _Vocabulary, "model")
    table = _table(model, file.added_tokens, decoding)
    table.key, table.refusal = key_of(text), problem
    return table


def key_of(text: str | bytes) -> str:
    """Return the sha256 (hex) of a tokenizer.json: who serves an adapter with the base's knows it by this."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def _read(text: str | bytes) -> _File:
    num_commas = text.count(",") if isinstance(text, str) else text.count(b",")
    if num_commas > MAX_COMMAS:
        raise refusal("", f"has more than {MAX_COMMAS} values")
    return _parsed(text, _File, "")


def _parsed(raw: str | bytes | Raw, kind: Any, place: str) -> Any:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise refusal(place, f"cannot be read: {error}") from error
    except RecursionError as error:
        raise refusal(place, "cannot be read: it is nested too deeply") from error


def _value(raw: Raw, place: str) -> Any:
    if len(bytes(raw)) > MAX_COMPONENT_BYTES:
        raise refusal(place, f"has {len(bytes(raw))} bytes; the limit is {MAX_COMPONENT_BYTES}")
    return _parsed(raw, Any, place)


def _kind(file: _File) -> str:
    """Return the type of a file's model. Raises AdapterRefused."""
    kind = _parsed(file.model, _Type, "model")
    name = kind.type
    if not name:
        words = "WordPiece" if bytes(kind.max_input_chars_per_word) else "WordLevel"
        name = "BPE" if bytes(kind.merges) else "Unigram" if bytes(kind.unk_id) else words
    if name not in _MODELS:
        raise refusal("model", f"is of the type {name[:40]!r}, not one of {', '.join(_MODELS)}")
    return name


def _model(file: _File) -> Model:
    """Return a file's model. Raises AdapterRefused."""
    model = _parsed(file.model, _MODELS[_kind(file)], "model")
    if isinstance(model, Bpe):
        model.merges = [_pair(merge) for merge in model.merges]
    return model


_MODELS: Mapping[str, type[Model]] = {"BPE": Bpe, "Unigram": Unigram, "WordPiece": WordPiece, "WordLevel": WordLevel}


def _pair(merge: str | tuple[str, str]) -> tuple[str, str]:
    """Return the two tokens of a merge, which older files have as one text."""
    if not isinstance(merge, str):
        return merge
    first, space, second = merge.partition(" ")
    if not space or " " in second:
        raise refusal("model.merges", f"has {merge[:80]!r}, which is not two tokens")
    return first, second


def _check_own(model: Model, added: Sequence[Added]) -> None:
    """Raise AdapterRefused for a vocabulary that no adapter may bring."""
    if not isinstance(model, Unigram):
        ids = set(model.vocab.values())
        if len(ids) < len(model.vocab):
            raise refusal("model.vocab", "gives an id to two tokens")
        num_missing = max(ids, default=-1) + 1 - len(ids)
        if num_missing > MAX_MISSING_IDS:
            raise refusal("model.vocab", f"leaves {num_missing} ids out; the limit is {MAX_MISSING_IDS}")
    if len({token.content for token in added}) < len(added):
        raise refusal("added_tokens", "has a token twice")
    if isinstance(model, Bpe) and model.dropout:
        raise refusal("model.dropout", f"is {model.dropout}: a text would have other tokens each time")
    if isinstance(model, Unigram) and not all(math.isfinite(score) for _, score in model.vocab):
        raise refusal("model.vocab", "has a score that is no finite number")


# ---------------------------------------------------------------- tokens


Place = Literal["", "first", "last"]
"""Where a token stands in a text, if that matters; "" elsewhere."""

Stage = Callable[[str, Place], str]
"""A decoder's work on one token."""


@dataclass(slots=True)
class _Decoding:
    """What a decoder does: to each token, then to bytes, then to the whole text."""

    stages: list[Stage]
    special_places: set[Place] = field(default_factory=set[Place])  # where a token becomes something else
    bytes_as: str = ""  # "ByteLevel" or "ByteFallback"
    strip: tuple[str, int] = ("", 0)

    def piece(self, token: str, place: Place) -> bytes:
        """Return what a token adds to a text."""
        for stage in self.stages:
            token = stage(token, place)
        if self.bytes_as == "ByteLevel":
            try:
                return token.translate(_BYTE_LEVEL).encode("latin-1")
            except UnicodeEncodeError:  # an added token, which is not in the alphabet of bytes
                return token.encode()
        if self.bytes_as == "ByteFallback" and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return token.encode()


def _decoding(value: Any) -> _Decoding:
    """Return what the decoder in a file does. Raises AdapterRefused for components and orders that are not known."""
    if value is None:
        return _Decoding([lambda token, place: token if place == "first" else f" {token}"], {"first"})
    decoding = _Decoding([])
    is_whole = False  # all tokens are one text now
    components = component_list(value, "decoder", DECODERS)
    for component in components:
        kind, fields = component.type, component.fields
        if kind == "Strip" and is_whole and not decoding.strip[1]:
            decoding.strip = fields.get("content", " "), fields.get("start", 0)
        elif kind == "Fuse":
            is_whole = True
        elif is_whole or decoding.bytes_as:
            raise refusal("decoder", f"has {kind} behind components that nothing but Fuse and Strip may follow")
        elif kind in ("ByteLevel", "ByteFallback"):
            decoding.bytes_as, is_whole = kind, kind == "ByteLevel"
        elif kind == "BPEDecoder" and len(components) > 1:
            raise refusal("decoder", "has a BPEDecoder beside others")
        elif kind == "Replace" and component.growth > 1:
            raise refusal("decoder", "has a Replace that makes tokens longer")
        else:
            decoding.stages.append(_STAGES[kind](fields))
            if kind == "WordPiece" or (kind == "Metaspace" and _prepends(fields)):
                decoding.special_places.add("first")
            if kind == "BPEDecoder":
                decoding.special_places.add("last")
    return decoding


def _prepends(metaspace: Mapping[str, Any]) -> bool:
    """Return whether a text begins with a mark that stands for nothing."""
    default = "always" if metaspace.get("add_prefix_space", True) else "never"
    return metaspace.get("prepend_scheme", default) != "never"


def _replace(fields: Mapping[str, Any]) -> Stage:
    pattern, content = fields["pattern"]["String"], fields["content"]
    return lambda token, place: token.replace(pattern, content)


def _metaspace(fields: Mapping[str, Any]) -> Stage:
    mark, at_first = fields["replacement"], "" if _prepends(fields) else " "
    return lambda token, place: token.replace(mark, at_first if place == "first" else " ")


def _strip(fields: Mapping[str, Any]) -> Stage:
    character, count = fields["content"], fields["start"]
    return lambda token, place: token[min(count, len(token) - len(token.lstrip(character))) :]


def _words(fields: Mapping[str, Any]) -> Stage:
    prefix, cleanup = fields["prefix"], fields["cleanup"]

    def join(token: str, place: Place) -> str:
        if place != "first":
            token = token.removeprefix(prefix) if token.startswith(prefix) else f" {token}"
        if cleanup:
            for written, clean in _CLEANUP:
                token = token.replace(written, clean)
        return token

    return join


def _word_ends(fields: Mapping[str, Any]) -> Stage:
    suffix = fields.get("suffix", "</w>")
    return lambda token, place: token.replace(suffix, "" if place == "last" else " ")


_STAGES: Mapping[str, Callable[[Mapping[str, Any]], Stage]] = {
    "BPEDecoder": _word_ends,
    "Replace": _replace,
    "Metaspace": _metaspace,
    "Strip": _strip,
    "WordPiece": _words,
}
_CLEANUP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
    (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip
_BYTE_TOKEN = re.compile(r"<0x(\+?[0-9A-Fa-f]|[0-9A-Fa-f]{2})>")


def _ids(model: Model | _Vocabulary) -> dict[str, int]:
    """Return the ids of a vocabulary's tokens."""
    return {token: i for i, (token, _) in enumerate(model.vocab)} if isinstance(model, Unigram) else model.vocab


def _table(model: Model | _Vocabulary, added: Sequence[Added], decoding: _Decoding) -> TokenTable:
    """Return the tokens of a vocabulary. Raises AdapterRefused."""
    ids = _ids(model)
    given = _given_ids(added, ids, len(model.vocab))
    names = {id_: token for token, id_ in ids.items()}
    if isinstance(model, Unigram):  # may have a token twice
        names = dict(enumerate(token for token, _ in model.vocab))
    names |= {id_: token for token, id_ in given.items()}
    size = max(names, default=-1) + 1
    not_shown = {token.content for token in added if token.special}
    special = frozenset(id_ for id_, token in names.items() if token in not_shown)
    pieces = [b""] * size
    try:
        for id_, token in names.items():
            pieces[id_] = token.encode() if id_ in special else decoding.piece(token, "")
        elsewhere: dict[Place, list[bytes]] = {place: pieces.copy() for place in decoding.special_places}
        for place, others in elsewhere.items():
            for id_, token in names.items():
                others[id_] = decoding.piece(token, place)
    except UnicodeEncodeError as error:
        raise refusal("the vocabulary", f"has a token that is not valid Unicode: {error}") from error
    return TokenTable(
        pieces=pieces,
        first=elsewhere.get("first"),
        last=elsewhere.get("last"),
        added=given,
        special=special,
        unknown=frozenset(range(size)) - names.keys(),
        invalid="byte" if decoding.bytes_as == "ByteFallback" else "part",
        strip=decoding.strip,
    )


def _given_ids(added: Sequence[Added], ids: Mapping[str, int], size: int) -> dict[str, int]:
    """Return the id that `tokenizers` gives each added token, whatever the file says. size: of the model's vocabulary.

    A token of the vocabulary keeps its id, others are counted on from its size.
    """
    given: dict[str, int] = {}
    highest = -1
    for token in added:
        if token.content and token.content not in given:
            id_ = ids.get(token.content, max(size, highest + 1))
            given[token.content] = id_
            highest = max(highest, id_)
    return given


def _byte_level() -> dict[int, int]:
    """Return the byte that each character of byte-level BPE's alphabet stands for, and no byte for the others.

    Printable Latin-1 characters stand for themselves, the other 68 bytes are moved to U+0100 and up, in order.
    """
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [value for value in range(256) if value not in kept]
    return dict.fromkeys(moved, 0xFFFF) | {0x100 + i: value for i, value in enumerate(moved)}


_BYTE_LEVEL = _byte_level()
