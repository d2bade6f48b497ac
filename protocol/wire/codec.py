"""Decoding of messages, and the clock of their times."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from protocol.wire.errors import ProtocolError

T = TypeVar("T")

MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are no message: also for text that is not UTF-8, and for values nested too deep.
"""

_decoders: dict[type, msgspec.msgpack.Decoder[Any]] = {}


def decode(raw: bytes, type_: type[T]) -> T:
    """Decode one message. Raises ProtocolError with the path of what is wrong."""
    decoder = _decoders.get(type_)
    if decoder is None:
        decoder = _decoders[type_] = msgspec.msgpack.Decoder(type_)
    try:
        return decoder.decode(raw)
    except MALFORMED as error:
        raise ProtocolError(f"cannot decode {type_}: {error}") from error
