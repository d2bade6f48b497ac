"""The decoder in a tokenizer.json: turns a token into characters, then bytes, then trims the ends of the text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from msgspec import Struct

from protocol.wire.errors import AdapterRefused


def refusal(place: str, what: str) -> AdapterRefused:
    """Return the error that names a place in a tokenizer.json ("" for the whole file) and the problem there."""
    return AdapterRefused([f"tokenizer.json: {place} {what}" if place else f"tokenizer.json {what}"])


Place = Literal["", "first", "last"]
"""A token's place in a text, if it matters; "" elsewhere."""

Stage = Callable[[str, Place], str]
"""One step of a decoder, applied to one token."""


class Decoder(Struct):
    """A decoder, with the fields of all supported kinds."""

    type: str
    decoders: list[Decoder] = []
    pattern: dict[str, str] = {}
    content: str = " "
    start: int = 0
    stop: int = 0
    replacement: str = "▁"
    prepend_scheme: str | None = None
    add_prefix_space: bool | None = None
    prefix: str = "##"
    suffix: str = "</w>"
    cleanup: bool = True

    @property
    def prepends(self) -> bool:
        """Whether, for Metaspace, a text begins with a mark that is not part of it."""
        default = "never" if self.add_prefix_space is False else "always"
        return (self.prepend_scheme or default) != "never"


@dataclass(slots=True)
class Decoding:
    """A decoder's operations: on each token, then on bytes, then on the whole text."""

    stages: list[Stage]
    special_places: set[Place] = field(default_factory=set[Place])  # where a token has another text
    bytes_as: str = ""  # "ByteLevel" or "ByteFallback"
    strip: tuple[str, int] = ("", 0)

    def piece(self, token: str, place: Place) -> bytes:
        """Return the bytes that a token adds to a text."""
        for stage in self.stages:
            token = stage(token, place)
        if self.bytes_as == "ByteLevel":
            try:
                return token.translate(_BYTE_LEVEL).encode("latin-1")
            except UnicodeEncodeError:  # an added token with characters outside the byte alphabet
                return token.encode()
        if self.bytes_as == "ByteFallback" and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return token.encode()


def decoding_of(decoder: Decoder | None) -> Decoding:
    """Return a decoder's operations. Raises AdapterRefused for unknown components and orders."""
    if decoder is None:
        return Decoding([lambda token, place: token if place == "first" else f" {token}"], {"first"})
    decoding = Decoding([])
    is_whole = False  # all tokens have been joined
    parts = _flat(decoder)
    for part in parts:
        kind = part.type
        if kind == "Strip" and is_whole and not decoding.strip[1] and not part.stop:
            decoding.strip = part.content, part.start
        elif kind == "Fuse":
            is_whole = True
        elif is_whole or decoding.bytes_as:
            raise refusal("decoder", f"has {kind} behind components that nothing but Fuse and Strip may follow")
        elif kind in ("ByteLevel", "ByteFallback"):
            decoding.bytes_as, is_whole = kind, kind == "ByteLevel"
        elif kind not in _STAGES or (kind == "Replace" and "String" not in part.pattern) or part.stop:
            raise refusal("decoder", f"has {kind[:40]}, which is not known")
        elif kind == "BPEDecoder" and len(parts) > 1:
            raise refusal("decoder", "has a BPEDecoder beside others")
        else:
            decoding.stages.append(_STAGES[kind](part))
            if kind == "WordPiece" or (kind == "Metaspace" and part.prepends):
                decoding.special_places.add("first")
            if kind == "BPEDecoder":
                decoding.special_places.add("last")
    return decoding


def _flat(decoder: Decoder) -> list[Decoder]:
    if decoder.type != "Sequence":
        return [decoder]
    return [part for inner in decoder.decoders for part in _flat(inner)]


def _replace(part: Decoder) -> Stage:
    pattern = part.pattern["String"]
    return lambda token, place: token.replace(pattern, part.content)


def _metaspace(part: Decoder) -> Stage:
    at_first = "" if part.prepends else " "
    return lambda token, place: token.replace(part.replacement, at_first if place == "first" else " ")


def _strip(part: Decoder) -> Stage:
    return lambda token, place: token[min(part.start, len(token) - len(token.lstrip(part.content))) :]


def _words(part: Decoder) -> Stage:
    def join(token: str, place: Place) -> str:
        if place != "first":
            token = token.removeprefix(part.prefix) if token.startswith(part.prefix) else f" {token}"
        if part.cleanup:
            for written, clean in _CLEANUP:
                token = token.replace(written, clean)
        return token

    return join


def _word_ends(part: Decoder) -> Stage:
    return lambda token, place: token.replace(part.suffix, "" if place == "last" else " ")


_STAGES: Mapping[str, Callable[[Decoder], Stage]] = {
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


def _byte_level() -> dict[int, int]:
    """Return the byte for each character in byte-level BPE's alphabet; other Latin-1 characters map to no byte.

    Printable Latin-1 characters stand for themselves; the other 68 bytes are shifted to U+0100 and up, in order.
    """
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [value for value in range(256) if value not in kept]
    return dict.fromkeys(moved, 0xFFFF) | {0x100 + i: value for i, value in enumerate(moved)}


_BYTE_LEVEL = _byte_level()
