"""For any invalid bytes in place of a message, the reader gets a ProtocolError, which it can handle."""

from __future__ import annotations

import base64

import msgspec
import pytest

from peft_adapters.recipe import PREFIX, merge_of
from protocol.wire import messages as m
from protocol.wire.codec import decode
from protocol.wire.error_codec import error_from
from protocol.wire.errors import BadRequest, Internal, ProtocolError

NOT_UTF8 = b"\x81\xa4name\xa1\xff"
DEEP = b"\x81\xa6config" + b"\x81\xa1a" * 100_000 + b"\xc0"


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (b"", m.Alias),
        (b"\xc1", m.Alias),
        (msgspec.msgpack.encode([1]), m.Alias),
        (NOT_UTF8, m.Alias),
        (DEEP, m.AdapterRecord),
        (b"\x91\x99\xa1\xff", list[m.Delta]),
    ],
)
def test_bytes_that_are_no_message_are_refused(raw: bytes, kind: type) -> None:
    with pytest.raises(ProtocolError, match="cannot decode"):
        decode(raw, kind)


@pytest.mark.parametrize("raw", [NOT_UTF8, DEEP, b"\xff"])
def test_a_merge_that_is_none_is_refused(raw: bytes) -> None:
    for packed in (base64.urlsafe_b64encode(raw).decode(), "é", "a"):
        with pytest.raises(BadRequest, match="not a merge of adapters"):
            merge_of(PREFIX + packed)


def test_an_error_that_cannot_be_read_is_still_an_error() -> None:
    for raw in (b'{"message": "\xff"}', b'{"kind": ' + b"[" * 100_000, "{"):
        assert isinstance(error_from(raw), Internal)
