"""The messages between a worker and its loader process, and their encoding on a Unix socket.

Each is four bytes of length, then msgpack. An adapter's data is not in the message: a descriptor of an in-memory file
accompanies it.
"""

from __future__ import annotations

import socket
from typing import Any

import msgspec

from gpu_worker.adapters.packing.rows import RowSite
from peft_adapters.texts.tokenizer_json import AddedToken
from protocol.wire.messages import ServedModel


class Start(msgspec.Struct, tag=True):
    """The first message to a process."""

    bearer: str  # the token for the stores, `FleetSecret.bearer`
    log_level: int
    log_format: str


class Urls(msgspec.Struct, tag=True):
    """The stores that are alive."""

    urls: tuple[str, ...]


class Describe(msgspec.Struct, tag=True):
    """The model for which adapters are packed. Adapters requested before it are returned as files."""

    sites: list[RowSite]
    served: ServedModel


class Fetch(msgspec.Struct, tag=True):
    """A request for an adapter, answered by one `Fetched`, `PackedAdapter` or `Failed`."""

    number: int  # request number, repeated in the answer
    digest: str
    whole: bool = False  # return the files themselves, not rows


class Fetched(msgspec.Struct, tag=True):
    """An adapter's files; the descriptor is the weights file's."""

    number: int
    config: dict[str, Any]
    added: list[AddedToken] | None  # as in `FetchedAdapter`


class PackedAdapter(msgspec.Struct, tag=True):
    """An adapter's rows; the descriptor is their buffer's, see `packing.rows`."""

    number: int
    ranks: bytes  # int32 [sites]
    scales: bytes  # float32 [sites]
    invocation: tuple[int, ...]
    added: list[AddedToken] | None  # as in `FetchedAdapter`


class Failed(msgspec.Struct, tag=True):
    """The error for which an adapter cannot be provided."""

    number: int
    error: str  # class name in protocol.wire.errors
    message: str
    param: str | None


Message = Start | Urls | Describe | Fetch | Fetched | PackedAdapter | Failed

_decoder = msgspec.msgpack.Decoder(Message)


def send(to: socket.socket, message: Message, fd: int | None = None) -> None:
    """Send a message, with a copy of a descriptor if given. Raises OSError."""
    payload = msgspec.msgpack.encode(message)
    socket.send_fds(to, [len(payload).to_bytes(4, "little")], [] if fd is None else [fd])
    to.sendall(payload)


def receive(source: socket.socket) -> tuple[Message, int | None] | None:
    """Return the next message and its descriptor, if any; None at the end of the stream. Raises OSError."""
    head, fds, _, _ = socket.recv_fds(source, 4, 1)
    if not head:
        return None
    head += _read(source, 4 - len(head))
    return _decoder.decode(_read(source, int.from_bytes(head, "little"))), fds[0] if fds else None


def _read(source: socket.socket, count: int) -> bytes:
    content = bytearray()
    while len(content) < count:
        piece = source.recv(count - len(content))
        if not piece:
            raise ConnectionError("the message is cut")
        content += piece
    return bytes(content)
