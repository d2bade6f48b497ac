"""Decoding of messages and of stored records."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec

from protocol.wire.errors import ClientError, NewerRecord, NotFound, ProtocolError, UnreadableRecord
from protocol.wire.messages.base import Record, Wire

T = TypeVar("T")
R = TypeVar("R", bound=Record)

MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""Raised by msgspec for bytes that are not a valid message, for text that is not UTF-8, and for values nested too deep.
"""

_decoders: dict[type, msgspec.msgpack.Decoder[Any]] = {}


def decode(raw: bytes, type_: type[T]) -> T:
    """Decode one message. Raises ProtocolError, which names the type and the invalid field's path."""
    decoder = _decoders.get(type_)
    if decoder is None:
        decoder = _decoders[type_] = msgspec.msgpack.Decoder(type_)
    try:
        return decoder.decode(raw)
    except MALFORMED as error:
        raise ProtocolError(f"cannot decode {type_}: {error}") from error


class _Form(Wire, frozen=True):
    """The field that all records share."""

    form: int = 1


def decode_record(raw: bytes, type_: type[R]) -> R:
    """Decode a stored record, which another release may have written.

    Raises NewerRecord if only newer releases know its form, UnreadableRecord if it cannot be decoded otherwise.
    """
    try:
        found = decode(raw, type_)
        form, cause = found.form, None
    except ProtocolError as error:
        try:
            form, cause = decode(raw, _Form).form, error
        except ProtocolError:
            form, cause = 0, error
        found = None
    if form > type_.FORM:
        text = f"this {type_.__name__} has form {form}, but this release knows {type_.FORM}: a newer release wrote it"
        raise NewerRecord(text) from cause
    if found is None:
        raise UnreadableRecord(f"this {type_.__name__} cannot be read: {cause}") from cause
    return found


@contextmanager
def as_kept(what: str) -> Generator[None]:
    """Raise UnreadableRecord for the errors of a block that parses stored JSON.

    Such JSON may have been written by an older release, with other fields or with values that are refused today. what:
    the subject of the error message.
    """
    try:
        yield
    except (ClientError, ValueError, TypeError, LookupError, AttributeError) as error:
        if isinstance(error, (NotFound, UnreadableRecord)):
            raise
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UnreadableRecord(f"{what} cannot be read: another release may have written it ({why})") from error
