"""Token ids to text: a table of every token's bytes, and a decoder that needs nothing else.

The library `tokenizers` decodes as well, with whatever a tokenizer.json tells it to do. Here that was settled when the
table was made (`peft_adapters/texts/tokenizer_json.py`), so a token costs a look into a list.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from functools import cached_property
from typing import Literal

import msgspec

from protocol.wire.errors import BadRequest

UNKNOWN_CHARACTERS = 256
"""Characters that one token stands for at most, whatever the vocabulary has: unknown words are one token each."""


class TokenTable(msgspec.Struct, dict=True, weakref=True):
    """Every token of a tokenizer as bytes, by id, and what decoding them as a whole needs besides. Never changed."""

    pieces: list[bytes]
    """What a token adds to a text; a special token's own text, which no text shows; b"" where an id is no token."""

    first: list[bytes] | None = None
    """What a token adds as the first of a text, where that is something else."""

    last: list[bytes] | None = None
    """What a token adds as the last of a text, where that is something else."""

    added: dict[str, int] = {}
    """The tokens that were added to the vocabulary as a whole, as markers are."""

    special: frozenset[int] = frozenset()
    """The ids that no text shows."""

    unknown: frozenset[int] = frozenset()
    """The ids below the number of pieces that are no token."""

    invalid: Literal["part", "byte"] = "part"
    """Whether bytes that are no character become one U+FFFD for each broken character, or for each byte."""

    strip: tuple[str, int] = ("", 0)
    """A character, and how many of them are taken from the beginning of a text."""

    key: str = ""
    """The hash of what the table was made of; it tells tables apart."""

    refusal: str = ""
    """Why ids cannot be decoded, "" if they can."""

    @cached_property
    def hidden(self) -> frozenset[int]:
        """The ids that decoding passes over."""
        return self.special | self.unknown

    @cached_property
    def longest(self) -> int:
        """Most characters of a token: a text cannot have fewer tokens than it has of these."""
        return max(UNKNOWN_CHARACTERS, max(map(len, self.pieces), default=0))

    @property
    def num_bytes(self) -> int:
        """The memory that its lists take, whose entries may be another table's."""
        return 8 * sum(len(pieces) for pieces in (self.pieces, self.first, self.last) if pieces is not None)

    def bytes_of(self, id_: int) -> bytes:
        """Return a token's UTF-8 bytes, which may be only a part of a character; b"" for what is no token."""
        return self.pieces[id_] if 0 <= id_ < len(self.pieces) else b""

    def text_of(self, id_: int) -> str:
        r"""Return a token as text; `bytes:\xe2\x80`, as OpenAI does, if it is not valid UTF-8 alone."""
        raw = self.bytes_of(id_)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{value:02x}" for value in raw)

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Return the text of ids, with special tokens or without. Raises BadRequest if they cannot be decoded."""
        detokenizer = Detokenizer(self, special=special)
        return detokenizer.add(ids) + detokenizer.flush()


class Detokenizer:
    """Decodes ids step by step, and never returns half a UTF-8 character."""

    def __init__(self, tokens: TokenTable, *, special: bool = False) -> None:
        """Begin a text, with special tokens or without. Raises BadRequest if this tokenizer's cannot be decoded."""
        if tokens.refusal:
            raise BadRequest(tokens.refusal)
        self._pieces, self._hidden = tokens.pieces, tokens.unknown if special else tokens.hidden
        self._first, self._last = tokens.first, tokens.last
        self._held: list[int] = []  # the last id so far, where it matters that it is
        self._stripped, self._num_strip = tokens.strip
        self._errors = "replace" if tokens.invalid == "part" else _EACH_BYTE
        self._rest = b""  # the beginning of a character of which the rest has not come
        self._is_plain = False  # whether a token's text does not depend on where it stands, from here on

    def add_one(self, id_: int) -> str:
        """Return the text that this further id completes."""
        if not self._is_plain:
            return self.add((id_,))
        return "" if id_ in self._hidden or not 0 <= id_ < len(self._pieces) else self._decode(self._pieces[id_])

    def add(self, ids: Iterable[int]) -> str:
        """Return the text that these further ids complete."""
        pieces, hidden, num = self._pieces, self._hidden, len(self._pieces)
        shown = [id_ for id_ in ids if id_ not in hidden and 0 <= id_ < num]
        if self._last is not None:
            shown = self._held + shown
            shown, self._held = shown[:-1], shown[-1:]
        if not shown:
            return ""
        raw = [pieces[id_] for id_ in shown]
        if self._first is not None:
            raw[0], self._first = self._first[shown[0]], None
        text = self._decode(b"".join(raw))
        self._is_plain = self._last is None and not self._num_strip
        return text if not self._num_strip else self._strip(text)

    def flush(self) -> str:
        """Return the text still held back, after the last id: the bytes of an incomplete character as U+FFFD."""
        held = b"" if self._last is None else b"".join(self._last[id_] for id_ in self._held)
        return self._decode(held, is_end=True)

    def _decode(self, raw: bytes, *, is_end: bool = False) -> str:
        raw = self._rest + raw
        text, num = codecs.utf_8_decode(raw, self._errors, is_end)
        self._rest = raw[num:]
        return text

    def _strip(self, text: str) -> str:
        while text and self._num_strip:
            if text[0] != self._stripped:
                self._num_strip = 0
            else:
                text, self._num_strip = text[1:], self._num_strip - 1
        return text


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


_EACH_BYTE = "lorafleet-each-byte"
codecs.register_error(_EACH_BYTE, _each_byte)
