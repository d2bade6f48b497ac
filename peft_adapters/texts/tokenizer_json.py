"""Reads tokenizer.json: digests for comparing two of them, the tokens that an adapter adds, and tokens as bytes.

An adapter is served with its base's tokenizer plus the tokens that its own file adds. Nothing in that file is executed:
the store parses it (`OwnTokenizer`), compares the digests of its parts with the base's, and keeps only the added
tokens. Decoding needs no library: `BaseTokens` precomputes the bytes that each token adds to a text.
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
"""Maximum tokens of a vocabulary, and maximum merges; ids are below it."""

MAX_COMMAS = 3 << 20
"""Bounds the values in a file before parsing: two per token and two per merge in the largest files."""

MAX_ADDED = 16_384
"""Maximum added tokens in any tokenizer.json; a base's own, chosen by an operator, may reach it."""

MAX_OWN_ADDED = 8_192
"""Maximum added tokens of an adapter: the library takes them in one call, which holds the GIL for 0.1 s."""

MAX_ADDED_BYTES = 512 << 10
"""Maximum UTF-8 bytes of all tokens that an adapter adds together; Gemma's 6,400 have 60,000."""

MAX_TOKEN_CHARS = 1_024
MAX_COMPONENT_BYTES = 2 << 20
MAX_NESTING = 32

_Token = Annotated[str, Meta(max_length=MAX_TOKEN_CHARS)]
_Id = Annotated[int, Meta(ge=0, lt=MAX_ENTRIES)]
_Ids = Annotated[dict[_Token, _Id], Meta(max_length=MAX_ENTRIES)]
_Scores = Annotated[list[tuple[_Token, float]], Meta(max_length=MAX_ENTRIES)]
_Merges = Annotated[list[str | tuple[str, str]], Meta(max_length=MAX_ENTRIES)]


class AddedToken(Struct):
    """A token outside the model's vocabulary, or one of it that is matched as a whole."""

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
    """The tokens of a model: their ids, or a Unigram's scores. Merges, which take as long to parse, are skipped."""

    vocab: _Ids | _Scores


class OwnTokenizer(Struct, forbid_unknown_fields=True):
    """The parts of an adapter's tokenizer.json that are kept."""

    parts: dict[str, str]
    """The digest of each part, as `parts_of` returns them."""

    added: AddedTokens
    """All added tokens, including the base's, with the ids that `tokenizers` assigns."""

    @classmethod
    def read(cls, text: str | bytes) -> OwnTokenizer:
        """Parse and check an adapter's tokenizer.json. Raises AdapterRefused."""
        file = _read(text)
        vocab = _vocab(file)
        own = cls(_parts(file, vocab), _numbered(file.added_tokens, vocab))
        own.check()
        return own

    def check(self) -> None:
        """Raise AdapterRefused if the added tokens exceed a limit or repeat."""
        if len(self.added) > MAX_OWN_ADDED:
            raise refusal("added_tokens", f"has {len(self.added)} tokens; the limit is {MAX_OWN_ADDED}")
        if len({token.content for token in self.added}) < len(self.added):
            raise refusal("added_tokens", "has a token twice")
        num_bytes = sum(len(token.content.encode()) for token in self.added)
        if num_bytes > MAX_ADDED_BYTES:
            raise refusal("added_tokens", f"has tokens of {num_bytes} bytes; the limit is {MAX_ADDED_BYTES}")

    def check_base(self, parts: Mapping[str, str]) -> None:
        """Raise AdapterRefused unless this tokenizer differs from a base's only in its added tokens.

        parts: the base's, as `parts_of` returns them; empty if it has no tokenizer.json.
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
    """Return a digest (hex) of each part of a tokenizer.json except its added tokens, by the part's name.

    Equivalent parts have equal digests: merges as strings or pairs, explicit or omitted defaults, nested sequences.
    Padding, truncation and settings without effect do not count. Raises AdapterRefused.
    """
    file = _read(text)
    return _parts(file, _vocab(file))


def ids_of(text: str) -> dict[str, int]:
    """Return the id of each token of a tokenizer.json, including added tokens, by its text.

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
    if not settings.get("type"):  # a file from before 2021
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
    """Return the components of a part, in order, in canonical form. Raises AdapterRefused."""
    if depth > MAX_NESTING:
        raise refusal(part, f"is nested deeper than {MAX_NESTING}")
    if value is None:
        return [None] if part == "decoder" else []  # without a decoder, tokens are joined by spaces
    kind = value.get("type") if is_object(value) else None
    if kind == "Sequence":
        lists: list[list[Any]] = [value[name] for name in _SEQUENCES if is_list(value.get(name))]
        return [found for one in (lists[0] if lists else []) for found in _components(one, part, depth + 1)]
    if part == "post_processor" and (kind == "ByteLevel" or _adds_nothing(value)):
        return []  # neither changes a token; ByteLevel only moves offsets
    if kind == "ByteLevel" and part == "decoder":  # its fields have no effect here
        return [kind]
    return [_canonical(value, part, depth)]


def _adds_nothing(value: Any) -> bool:
    """Return whether a post-processor is the template that transformers 5 writes in place of none."""
    first, second = ({"Sequence": {"id": id_, "type_id": i}} for i, id_ in enumerate("AB"))
    return is_object(value) and (value.get("single"), value.get("pair")) == ([first], [first, second])


_SEQUENCES = ("normalizers", "pretokenizers", "processors", "decoders")


def _canonical(value: Any, part: str, depth: int = 0) -> Any:
    """Return a JSON value without fields at their defaults, and with older spellings replaced."""
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
    dropped = "trim_offsets" if kind == "ByteLevel" else ""  # only has an effect in post-processors
    return {
        name: _canonical(one, part, depth + 1)
        for name, one in value.items()
        if name != dropped and not _is_default(name, one)
    }


def _is_default(name: str, value: Any) -> bool:
    """Return whether a field's value is the same as its absence."""
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
    """Return added tokens with the ids that `tokenizers` assigns, ignoring the file's; drops those without text.

    A token in the vocabulary keeps its id; others are numbered from the vocabulary's size.
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
    """The bytes that tokens of a base's tokenizer.json add to a text, and the same with adapters' added tokens.

    Usable from several threads.
    """

    def __init__(self, text: str) -> None:
        """Precompute the tokens' bytes, which takes a second for a large vocabulary. Raises AdapterRefused."""
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
        self._tables: WeakValueDictionary[str, TokenTable] = WeakValueDictionary()  # for adapters, while in use
        self.table = self._table(self._added, self._found(self._added), self._key)

    def with_added(self, added: Sequence[AddedToken]) -> TokenTable:
        """Return the token table with these added tokens in place of the base's; equal ones share a table.

        added: all added tokens, as in `OwnTokenizer`; the base's own give the base's table. Raises AdapterRefused if
        normalizing makes tokens empty or equal.
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
        """Return, by content, the text under which `tokenizers` matches and decodes each added token.

        Recent releases decode normalized tokens to the normalizer's output; earlier ones do not.
        """
        found = {token.content: token.content for token in added}
        if self._normalizer == b"null" or not any(token.normalized for token in added):
            return found
        from tokenizers import AddedToken as Token  # imported here, because most processes never need it
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
