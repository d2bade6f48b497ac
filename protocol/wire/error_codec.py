"""Errors on the wire: an error is decoded as the class with which it was encoded."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from protocol.wire import errors
from protocol.wire import messages as m
from protocol.wire.codec import MALFORMED
from protocol.wire.errors import AdapterRefused, Internal, LorafleetError


def _tree(cls: type[LorafleetError]) -> Iterator[type[LorafleetError]]:
    if cls.__module__ == errors.__name__:
        yield cls
        for sub in cls.__subclasses__():
            yield from _tree(sub)


CLASSES = {cls.__name__: cls for cls in _tree(LorafleetError)}
"""The classes of `protocol.wire.errors` by name. An error of any other class is encoded as its nearest base in here."""


def error_json(error: LorafleetError | None) -> str:
    """Return the JSON of the error's `ErrorInfo`, "" for None."""
    if error is None:
        return ""
    info = m.ErrorInfo(
        message=error.message,
        kind=next(cls.__name__ for cls in type(error).__mro__ if CLASSES.get(cls.__name__) is cls),
        code=error.code,
        param=error.param,
        retry_after_s=error.retry_after_s,
        reasons=error.reasons if isinstance(error, AdapterRefused) else [],
    )
    return msgspec.json.encode(info).decode()


def error_from(raw: str | bytes) -> LorafleetError:
    """Return the error that `raw`, the JSON of an `ErrorInfo`, describes; an `Internal` error if it cannot be read."""
    try:
        info = msgspec.json.decode(raw, type=m.ErrorInfo)
    except MALFORMED:
        return Internal("the request failed and its error cannot be read")
    cls = CLASSES.get(info.kind)
    if cls is None:
        return Internal(f"the request failed with an error of an unknown kind, {info.kind}: {info.message}")
    error = cls.__new__(cls)
    # Not the class's own constructor: it may build the message from other arguments.
    LorafleetError.__init__(error, info.message, param=info.param, code=info.code)
    if info.retry_after_s is not None:
        error.retry_after_s = info.retry_after_s
    if isinstance(error, AdapterRefused):
        error.reasons = info.reasons
    return error
