"""What the loader's process does when packing fails: the worker hears of it, and nothing stays open."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from gpu_worker.adapters.loader.fetch import Allocate, FetchedAdapter
from gpu_worker.adapters.loader.messages import Failed, Fetch, Fetched, receive
from gpu_worker.adapters.loader.process import LoaderServer


class OneAdapter:
    """Stores that hold one adapter under every digest."""

    base_tokenizer = ""

    def set_urls(self, urls: tuple[str, ...]) -> None:
        return

    def fetch(self, digest: str, allocate: Allocate = bytearray) -> FetchedAdapter:
        memory = allocate(7)
        memory[:] = b"weights"
        return FetchedAdapter({}, memory)


class FailingPacker:
    """A packer that takes memory and then raises, or finds that the adapter is not plain."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def pack(self, config: Any, file: Any, allocate: Callable[[int], Any]) -> None:
        allocate(4096)
        if self.error is not None:
            raise self.error


@pytest.fixture
def worker() -> Iterator[tuple[socket.socket, LoaderServer]]:
    """A worker's end of the socket, and the server at the other end."""
    ours, theirs = socket.socketpair()
    with closing(ours), closing(theirs):
        yield ours, LoaderServer(theirs, OneAdapter())


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("error", [ValueError("a fault"), MemoryError(), None])
def test_no_memory_stays_open_when_nothing_is_packed(
    worker: tuple[socket.socket, LoaderServer], error: Exception | None
) -> None:
    ours, server = worker
    packer: Any = FailingPacker(error)
    server.packer = packer
    before = num_open_files()
    server.answer(Fetch(7, "d"))
    assert num_open_files() == before
    received = receive(ours)
    assert received is not None
    message, fd = received
    if error is not None:
        assert message == Failed(7, "Internal", "fetching adapter d failed", None)
        assert fd is None
    else:
        assert message == Fetched(7, {}, None)
        assert fd is not None
        assert os.read(fd, 100) == b"weights"
        os.close(fd)
