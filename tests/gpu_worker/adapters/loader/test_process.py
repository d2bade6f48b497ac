"""The loader process when packing fails: the worker gets the error, and no descriptor stays open."""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from helpers.processes import num_open_files
from safetensors.numpy import save

from gpu_worker.adapters.loader.fetch import Allocate, FetchedAdapter, Turn
from gpu_worker.adapters.loader.memory import new_file, rounded
from gpu_worker.adapters.loader.messages import Describe, Failed, Fetch, Fetched, PackedAdapter, receive
from gpu_worker.adapters.loader.process import LoaderServer
from gpu_worker.adapters.loader.reserve import MemoryReserve
from gpu_worker.adapters.packing.rows import RowSite
from protocol.wire.messages import ServedModel, SiteShape


class Held:
    """Stores that hold adapters by digest."""

    def __init__(self, **held: FetchedAdapter) -> None:
        self.held = held

    def set_urls(self, urls: tuple[str, ...]) -> None:
        return

    def fetch(self, digest: str, allocate: Allocate = bytearray, turn: Turn | None = None) -> FetchedAdapter:
        adapter = self.held[digest]
        memory = allocate(len(adapter.weights))
        memory[:] = adapter.weights
        return FetchedAdapter(adapter.config, memory)


class Seen(Held):
    """The same, with a view of the memory that the last one was read into."""

    view = memoryview(b"")

    def fetch(self, digest: str, allocate: Allocate = bytearray, turn: Turn | None = None) -> FetchedAdapter:
        found = super().fetch(digest, allocate, turn)
        self.view = memoryview(found.weights)
        return found


CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q"]}


def described(width: int, dtype: str) -> Describe:
    """Return what a worker says of a model with one layer, of this width."""
    served = ServedModel(
        model="m", name="m", fingerprint="", model_type="", vocab_size=10, max_model_len=10,
        sites=[SiteShape("layers.0.q", width, width)],
    )  # fmt: skip
    return Describe([RowSite("layers.0.q", width, width, dtype)], served)


class FailingPacker:
    """A packer that allocates memory and then raises, or reports that the adapter is not plain."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def pack(self, config: Any, file: Any, allocate: Callable[[int], Any], release: object) -> None:
        allocate(4096)
        if self.error is not None:
            raise self.error


@pytest.fixture
def worker() -> Iterator[tuple[socket.socket, LoaderServer]]:
    """Yield the worker's end of the socket, and the loader's server on the other end."""
    ours, theirs = socket.socketpair()
    with closing(ours), closing(theirs):
        yield ours, LoaderServer(theirs, Held(d=FetchedAdapter({}, b"weights")))


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


@pytest.mark.parametrize("is_large", [False, True])
def test_a_large_file_is_given_back_while_it_is_packed(is_large: bool) -> None:
    name, ones = "base_model.model.layers.0.q.lora_{}.weight", np.ones((4, 8192), np.float32)
    weights = save({name.format("A"): ones, name.format("B"): ones.T.copy()})
    store = Seen(d=FetchedAdapter(CONFIG, weights))
    ours, theirs = socket.socketpair()
    with closing(ours), closing(theirs):
        server = LoaderServer(theirs, store, 0 if is_large else 1 << 30)
        server.take(described(8192, "float32"))
        server.answer(Fetch(1, "d"))
        received = receive(ours)
    assert received is not None
    assert isinstance(received[0], PackedAdapter)
    assert received[1] is not None
    with mmap.mmap(received[1], 0) as rows:
        assert rows[:] == bytes(ones.tobytes() * 2)
    os.close(received[1])
    middle = len(weights) // 4  # in the middle of A
    assert store.view[middle : middle + 4] == (bytes(4) if is_large else ones.tobytes()[:4])


class MemoryInReserve(MemoryReserve):
    """A reserve that always has a file of the requested size, filled with zeros, without a process."""

    num_taken = 0

    def take(self, num_bytes: int) -> int:
        self.num_taken += 1
        fd = new_file()
        os.truncate(fd, rounded(num_bytes))
        return fd


def test_adapters_have_nothing_of_others_whose_memory_they_are_read_into() -> None:
    """Rows and files in reused memory equal those in fresh memory: values, zero padding and length."""
    name = "base_model.model.layers.0.q.lora_{}.weight"

    def weights(seed: int, width: int) -> bytes:
        numbers = np.random.default_rng(seed).standard_normal((4, width), np.float32)
        return save({name.format("A"): numbers, name.format("B"): numbers.T.copy()})

    wide, same = weights(0, 8191), weights(1, 8191)
    half = wide[: len(wide) // 2]
    stores = Held(
        first=FetchedAdapter(CONFIG, wide), later=FetchedAdapter(CONFIG, same),
        files=FetchedAdapter(CONFIG | {"use_dora": True}, half),
    )  # fmt: skip

    def answers(digests: list[str], reserve: MemoryReserve | None = None) -> list[bytes]:
        ours, theirs = socket.socketpair()
        got: list[bytes] = []
        with closing(ours), closing(theirs):
            server = LoaderServer(theirs, stores, reserve=reserve)
            server.take(described(8191, "bfloat16"))
            for number, digest in enumerate(digests):
                server.answer(Fetch(number, digest))
                received = receive(ours)
                assert received is not None
                assert isinstance(received[0], Fetched if digest == "files" else PackedAdapter)
                assert received[1] is not None
                with mmap.mmap(received[1], 0) as memory:
                    got.append(memory[:])
                os.close(received[1])
        return got

    first, later, files, again = answers(["first", "later", "files", "first"])
    assert [later] == answers(["later"])
    assert files == half
    assert again == first != later
    with closing(MemoryInReserve()) as reserve:
        assert answers(["first", "later"], reserve) == [first, later]
        assert reserve.num_taken == 2
