"""A tokenizer.json: what tells two of them apart, the tokens that an adapter's adds, and tokens as bytes.

An adapter is served with its base's tokenizer and the tokens that its own file adds to that. Nothing of its file is
run: the store reads it (`OwnTokenizer`), holds the digests of its parts against the base's, and keeps the added tokens
alone. Decoding needs no library: `BaseTokens` works out once what each token adds to a text.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from typing import Annotated, Any
from weakref import WeakValueDictionary

import msgspec
from msgspec import Meta, Raw, Struct

from peft_adapters.json_values import is_list, is_object
from peft_adapters.texts.decoders import Decoder, Decoding, Place, decoding_of, refusal
from protocol.wire.errors import AdapterRefused
from protocol.wire.tokens import TokenTable

MAX_ENTRIES = 1 << 20
"""Tokens of a vocabulary, and merges; ids are below it."""

MAX_COMMAS = 3 << 20
"""Bounds the values of a file before any is made: two a token, and two a merge, of the largest files there are."""

MAX_ADDED = 16_384
"""Most added tokens of any tokenizer.json: a base's own, which an operator has chosen, may be as many."""

MAX_OWN_ADDED = 8_192
"""Most of an adapter's: the library takes them in one call, which holds the interpreter for 0.1 s."""

MAX_ADDED_BYTES = 512 << 10
"""Bytes of UTF-8 that all tokens which an adapter's file adds have together; Gemma's 6,400 have 60,000."""

MAX_TOKEN_CHARS = 1_024
MAX_COMPONENT_BYTES = 2 << 20
MAX_NESTING = 32

_Token = Annotated[str, Meta(max_length=MAX_TOKEN_CHARS)]
_Id = Annotated[int, Meta(ge=0, lt=MAX_ENTRIES)]
_Ids = Annotated[dict[_Token, _Id], Meta(max_length=MAX_ENTRIES)]
_Scores = Annotated[list[tuple[_Token, float]], Meta(max_length=MAX_ENTRIES)]
_Merges = Annotated[list[str | tuple[str, str]], Meta(max_length=MAX_ENTRIES)]


class AddedToken(Struct):
    """A token beside the model's vocabulary, or one of it that is looked for as a whole."""

    id: Annotated[int, Meta(ge=0, lt=MAX_ENTRIES + MAX_ADDED)]
    content: _Token
    special: bool
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True


AddedTokens = Annotated[list[AddedToken], Meta(max_length=MAX_ADDED)]


class _File(Struct):
    model: Raw
    added_tokens: AddedTokens = []
    normalizer: Raw = Raw(b"null")
    pre_tokenizer: Raw = Raw(b"null")
    post_processor: Raw = Raw(b"null")
    decoder: Raw = Raw(b"null")


class _Model(Struct):
    """The tokens of a model: their ids, or a Unigram's scores. Merges, which take as long to read, are left unread."""

    vocab: _Ids | _Scores


class OwnTokenizer(Struct, forbid_unknown_fields=True):
    """What is kept of the tokenizer.json that an adapter brings."""

    parts: dict[str, str]
    """The digest of each part, as `parts_of` returns them."""

    added: AddedTokens
    """The added tokens, the base's among them, with the ids that `tokenizers` gives them."""

    @classmethod
    def read(cls, text: str | bytes) -> OwnTokenizer:
        """Read and check an adapter's tokenizer.json. Raises AdapterRefused."""
        file = _read(text)
        vocab = _vocab(file)
        own = cls(_parts(file, vocab), _numbered(file.added_tokens, vocab))
        own.check()
        return own

    def check(self) -> None:
        """Raise AdapterRefused for added tokens that no adapter may bring."""
        if len(self.added) > MAX_OWN_ADDED:
            raise refusal("added_tokens", f"has {len(self.added)} tokens; the limit is {MAX_OWN_ADDED}")
        if len({token.content for token in self.added}) < len(self.added):
            raise refusal("added_tokens", "has a token twice")
        num_bytes = sum(len(token.content.encode()) for token in self.added)
        if num_bytes > MAX_ADDED_BYTES:
            raise refusal("added_tokens", f"has tokens of {num_bytes} bytes; the limit is {MAX_ADDED_BYTES}")

    def check_base(self, parts: Mapping[str, str]) -> None:
        """Raise AdapterRefused unless this is a base's tokenizer with other added tokens at most.

        parts: of the base's, as `parts_of` returns them; none where it has no tokenizer.json.
        """
        if not parts:
            raise refusal("", "cannot be served: the base model has none")
        others = [name for name in parts if self.parts.get(name) != parts[name]]
        if others:
            *most, last = others
            names = f"{', '.join(most)} and {last}" if most else last
            raise refusal(
                "",
                f"differs from the base model's in its {names}; only added tokens are served: remove the file to use"
                " the base's tokenizer, or retrain with the base's",
            )


def parts_of(text: str) -> dict[str, str]:
    """Return a digest (hex) of each part of a tokenizer.json but its added tokens, by the part's name.

    Equal parts have equal digests however they are written: merges as texts or as pairs, defaults or nothing in their
    place, sequences within sequences. Padding, truncation and what changes nothing do not count. Raises AdapterRefused.
    """
    file = _read(text)
    return _parts(file, _vocab(file))


def ids_of(text: str) -> dict[str, int]:
    """Return the id of each token of a tokenizer.json, its added tokens' among them, by its text.

    Raises AdapterRefused for a file that cannot be read.
    """
    file = _read(text)
    vocab = _vocab(file)
    ids = {token: i for i, (token, _) in enumerate(vocab)} if isinstance(vocab, list) else vocab
    return ids | {token.content: token.id for token in _numbered(file.added_tokens, vocab)}


def _parts(file: _File, vocab: dict[str, int] | list[tuple[str, float]]) -> dict[str, str]:
    fields = _parsed(file.model, dict[str, Raw], "model")
    del fields["vocab"]
    is_bpe = "merges" in fields
    merges = _parsed(fields.pop("merges", Raw(b"[]")), _Merges, "model.merges")
    settings = {name: _value(raw, f"model.{name}") for name, raw in fields.items()}
    if not settings.get("type"):  # a file of before 2021
        words = "WordPiece" if "max_input_chars_per_word" in settings else "WordLevel"
        settings["type"] = "BPE" if is_bpe else "Unigram" if isinstance(vocab, list) else words
    found = {
        "vocabulary": vocab,
        "merges": [merge.split(" ") if isinstance(merge, str) else merge for merge in merges],
        "model": _canonical(settings, "model"),
        "normalizer": _components(_value(file.normalizer, "normalizer"), "normalizer"),
        "pre_tokenizer": _components(_value(file.pre_tokenizer, "pre_tokenizer"), "pre_tokenizer"),
        "post_processor": _components(_value(file.post_processor, "post_processor"), "post_processor"),
        "decoder": _components(_value(file.decoder, "decoder"), "decoder"),
    }
    return {name: _digest(part) for name, part in found.items()}


def _components(value: Any, part: str, depth: int = 0) -> list[Any]:
    """Return the components of a part, in order, in their one form. Raises AdapterRefused."""
    if depth > MAX_NESTING:
        raise refusal(part, f"is nested deeper than {MAX_NESTING}")
    if value is None:
        return [None] if part == "decoder" else []  # without a decoder, tokens are joined by spaces
    kind = value.get("type") if is_object(value) else None
    if kind == "Sequence":
        lists: list[list[Any]] = [value[name] for name in _SEQUENCES if is_list(value.get(name))]
        return [found for one in (lists[0] if lists else []) for found in _components(one, part, depth + 1)]
    if part == "post_processor" and (kind == "ByteLevel" or _adds_nothing(value)):
        return []  # of which the first moves offsets, and changes no token
    if kind == "ByteLevel" and part == "decoder":  # its fields mean nothing here
        return [kind]
    return [_canonical(value, part, depth)]


def _adds_nothing(value: Any) -> bool:
    """Return whether a post-processor is the template that transformers 5 writes where there was none."""
    first, second = ({"Sequence": {"id": id_, "type_id": i}} for i, id_ in enumerate("AB"))
    return is_object(value) and (value.get("single"), value.get("pair")) == ([first], [first, second])


_SEQUENCES = ("normalizers", "pretokenizers", "processors", "decoders")


def _canonical(value: Any, part: str, depth: int = 0) -> Any:
    """Return a JSON value without fields that have their default, or that older releases wrote otherwise."""
    if depth > MAX_NESTING:
        raise refusal(part, f"is nested deeper than {MAX_NESTING}")
    if is_list(value):
        return [_canonical(one, part, depth + 1) for one in value]
    if not is_object(value):
        return value
    kind = value.get("type")
    if kind == "Metaspace":
        scheme = value.get("prepend_scheme") or ("never" if value.get("add_prefix_space") is False else "always")
        return [kind, value.get("replacement"), scheme, value.get("split") is not False]
    dropped = "trim_offsets" if kind == "ByteLevel" else ""  # means something in post-processors alone
    return {
        name: _canonical(one, part, depth + 1)
        for name, one in value.items()
        if name != dropped and not _is_default(name, one)
    }


def _is_default(name: str, value: Any) -> bool:
    """Return whether a field says what its absence says."""
    if name == "use_regex":
        return value is True
    return value is None or value is False or value == "" or (name == "behavior" and value == "Isolated")


def _digest(value: Any) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()


# ---------------------------------------------------------------- reading


def _read(text: str | bytes) -> _File:
    num_commas = text.count(",") if isinstance(text, str) else text.count(b",")
    if num_commas > MAX_COMMAS:
        raise refusal("", f"has more than {MAX_COMMAS} values")
    return _parsed(text, _File, "")


def _vocab(file: _File) -> dict[str, int] | list[tuple[str, float]]:
    return _parsed(file.model, _Model, "model").vocab


def _parsed(raw: str | bytes | Raw, kind: Any, place: str) -> Any:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise refusal(place, f"cannot be read: {error}") from error
    except RecursionError as error:
        raise refusal(place, "cannot be read: it is nested too deeply") from error


def _value(raw: Raw, place: str, kind: Any = Any) -> Any:
    if len(bytes(raw)) > MAX_COMPONENT_BYTES:
        raise refusal(place, f"has {len(bytes(raw))} bytes; the limit is {MAX_COMPONENT_BYTES}")
    return _parsed(raw, kind, place)


def _numbered(added: Sequence[AddedToken], vocab: dict[str, int] | list[tuple[str, float]]) -> list[AddedToken]:
    """Return added tokens with the ids that `tokenizers` gives them, whatever the file says, and none without text.

    A token of the vocabulary keeps its id, others are counted on from its size.
    """
    ids = {token: i for i, (token, _) in enumerate(vocab)} if isinstance(vocab, list) else vocab
    found: list[AddedToken] = []
    highest = -1
    for token in added:
        if token.content:
            id_ = ids.get(token.content, max(len(vocab), highest + 1))
            highest = max(highest, id_)
            found.append(msgspec.structs.replace(token, id=id_))
    return found


# ---------------------------------------------------------------- tokens


class BaseTokens:
    """What the tokens of a base model's tokenizer.json add to a text, and those of adapters that add others to it.

    Usable from several threads.
    """

    def __init__(self, text: str) -> None:
        """Read the tokens, which takes a second for a large vocabulary. Raises AdapterRefused."""
        file = _read(text)
        vocab = _vocab(file)
        try:
            self._decoding, self._refusal = decoding_of(_value(file.decoder, "decoder", Decoder | None)), ""
        except AdapterRefused as error:
            self._decoding = Decoding([])
            self._refusal = f"tokens of this model cannot be decoded: {error.message}"
        self._key = hashlib.sha256(text.encode()).hexdigest()
        self._normalizer = bytes(file.normalizer)
        names = {id_: token for token, id_ in vocab.items()} if isinstance(vocab, dict) else _by_index(vocab)
        size = max(names, default=-1) + 1
        self._plain: dict[Place, list[bytes]] = {place: [b""] * size for place in ("", *self._decoding.special_places)}
        for place, pieces in self._plain.items():
            for id_, token in names.items():
                pieces[id_] = self._decoding.piece(token, place)
        self._gaps = frozenset(range(size)) - names.keys()
        self._added = list({token.content: token for token in _numbered(file.added_tokens, vocab)}.values())
        self._lock = threading.Lock()
        self._tables: WeakValueDictionary[str, TokenTable] = WeakValueDictionary()  # of adapters, while one is held
        self.table = self._table(self._added, self._found(self._added), self._key)

    def with_added(self, added: Sequence[AddedToken]) -> TokenTable:
        """Return the tokens where these are added in place of the base's own: one table for equal ones.

        added: all of them, as `OwnTokenizer` has them; for the base's own it is the base's table. Raises AdapterRefused
        for tokens of which normalizing leaves nothing, or the same.
        """
        if list(added) == self._added:
            return self.table
        found = self._found(added)
        if "" in found.values() or len(set(found.values())) < len(found):
            raise refusal("added_tokens", "has tokens of which the base's normalizer leaves nothing, or the same")
        key = hashlib.sha256(self._key.encode() + msgspec.json.encode(added)).hexdigest()
        with self._lock:
            table = self._tables.get(key)
            if table is None:
                self._tables[key] = table = self._table(added, found, key)
            return table

    def _found(self, added: Sequence[AddedToken]) -> dict[str, str]:
        """Return by their texts what `tokenizers` looks for, and decodes, in the place of added tokens.

        Recent releases decode, of those that are normalized, what the normalizer makes of them; earlier ones do not.
        """
        found = {token.content: token.content for token in added}
        if self._normalizer == b"null" or not any(token.normalized for token in added):
            return found
        from tokenizers import AddedToken as Token  # here, because most processes never need it
        from tokenizers import Tokenizer

        library: Any = Tokenizer.from_buffer(_NORMALIZING % self._normalizer)
        names = [token.content for token in added if token.normalized]
        library.add_tokens([Token(name, normalized=True) for name in names])
        return found | {name: library.id_to_token(i) or "" for i, name in enumerate(names)}

    def _table(self, added: Sequence[AddedToken], found: Mapping[str, str], key: str) -> TokenTable:
        size = len(self._plain[""])
        more = max((token.id + 1 - size for token in added), default=0)
        tables: dict[Place, list[bytes]] = {place: [*pieces, *[b""] * more] for place, pieces in self._plain.items()}
        special = frozenset(token.id for token in added if token.special and found[token.content] == token.content)
        for place, pieces in tables.items():
            for token in added:
                is_hidden = token.id in special and not place
                text = found[token.content]
                pieces[token.id] = text.encode() if is_hidden else self._decoding.piece(text, place)
        return TokenTable(
            pieces=tables[""],
            first=tables.get("first"),
            last=tables.get("last"),
            added={token.content: token.id for token in added},
            special=special,
            unknown=self._gaps.union(range(size, size + more)).difference(token.id for token in added),
            invalid="byte" if self._decoding.bytes_as == "ByteFallback" else "part",
            strip=self._decoding.strip,
            key=key,
            refusal=self._refusal,
        )


_NORMALIZING = b'{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":[]},"normalizer":%b}'


def _by_index(vocab: list[tuple[str, float]]) -> dict[int, str]:
    return dict(enumerate(token for token, _ in vocab))
