"""Text from token ids: a table of every token's bytes, and a decoder that needs nothing else.

The library `tokenizers` follows the decoder of a tokenizer.json for every text. These rules were applied once when the
table was made (`peft_adapters/texts/tokenizer_json.py`), so that decoding a token is one list lookup.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from functools import cached_property
from typing import Literal

import msgspec

from protocol.wire.errors import BadRequest

UNKNOWN_CHARACTERS = 256
"""Characters that one token may stand for even if no piece is that long: an unknown word is one token."""


class TokenTable(msgspec.Struct, dict=True, weakref=True):
    """Every token of a tokenizer as bytes, by id, with the rules for decoding whole texts. Immutable."""

    pieces: list[bytes]
    """The bytes that a token adds to a text; for a special token its own text, which is not shown; b"" for unused ids.
    """

    first: list[bytes] | None = None
    """The bytes that a token adds at the beginning of a text, if they can differ from `pieces`."""

    last: list[bytes] | None = None
    """The bytes that a token adds at the end of a text, if they can differ from `pieces`."""

    added: dict[str, int] = {}
    """Text -> id of the tokens that were added to the vocabulary as a whole, such as markers."""

    special: frozenset[int] = frozenset()
    """The ids that are not shown in a text."""

    unknown: frozenset[int] = frozenset()
    """The ids below the number of pieces that are not a token."""

    invalid: Literal["part", "byte"] = "part"
    """Whether invalid UTF-8 becomes one U+FFFD per broken character ("part"), or one per byte."""

    strip: tuple[str, int] = ("", 0)
    """A character, and the maximum number of them that is stripped from the beginning of a text."""

    key: str = ""
    """The hash of the table's source; it identifies the table."""

    refusal: str = ""
    """Why ids cannot be decoded; "" if they can."""

    @cached_property
    def hidden(self) -> frozenset[int]:
        """The ids that decoding skips."""
        return self.special | self.unknown

    @cached_property
    def longest(self) -> int:
        """Maximum characters of a token, which gives a lower bound of a text's number of tokens."""
        return max(UNKNOWN_CHARACTERS, max(map(len, self.pieces), default=0))

    @property
    def num_bytes(self) -> int:
        """The bytes of the lists themselves; their entries may be shared with other tables."""
        return 8 * sum(len(pieces) for pieces in (self.pieces, self.first, self.last) if pieces is not None)

    def bytes_of(self, id_: int) -> bytes:
        """Return a token's UTF-8 bytes, perhaps only part of a character; b"" if the id is not a token."""
        return self.pieces[id_] if 0 <= id_ < len(self.pieces) else b""

    def text_of(self, id_: int) -> str:
        r"""Return a token as text; `bytes:\xe2\x80`, as in OpenAI's API, if it is not valid UTF-8 by itself."""
        raw = self.bytes_of(id_)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{value:02x}" for value in raw)

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Return the text of ids, with or without special tokens. Raises BadRequest if they cannot be decoded."""
        detokenizer = Detokenizer(self, special=special)
        return detokenizer.add(ids) + detokenizer.flush()


class Detokenizer:
    """Decodes ids incrementally and never returns part of a UTF-8 character."""

    def __init__(self, tokens: TokenTable, *, special: bool = False) -> None:
        """Begin a text, with or without special tokens. Raises BadRequest if this tokenizer's ids cannot be decoded."""
        if tokens.refusal:
            raise BadRequest(tokens.refusal)
        self._pieces, self._hidden = tokens.pieces, tokens.unknown if special else tokens.hidden
        self._first, self._last = tokens.first, tokens.last
        self._held: list[int] = []  # the last id so far, if a last token has bytes of its own
        self._stripped, self._num_strip = tokens.strip
        self._errors = "replace" if tokens.invalid == "part" else _EACH_BYTE
        self._rest = b""  # the first bytes of an incomplete character
        self._is_plain = False  # whether, from here on, a token's text no longer depends on its position

    def add_one(self, id_: int) -> str:
        """Return the text that this id completes."""
        if not self._is_plain:
            return self.add((id_,))
        return "" if id_ in self._hidden or not 0 <= id_ < len(self._pieces) else self._decode(self._pieces[id_])

    def add(self, ids: Iterable[int]) -> str:
        """Return the text that these ids complete."""
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
        """Return the text still held back, after the last id; an incomplete character becomes U+FFFD."""
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
