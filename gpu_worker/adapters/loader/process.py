"""The loader's process: it fetches and packs adapters for one worker until the worker's end of the socket closes."""

from __future__ import annotations

import logging
import mmap
import os
import signal
import socket
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, Protocol

from gpu_worker.adapters.loader.fetch import FETCH_TIMEOUT_S, Allocate, FetchedAdapter, StoreClient
from gpu_worker.adapters.loader.messages import (
    Describe,
    Failed,
    Fetch,
    Fetched,
    Message,
    OwnTokens,
    Packed,
    Start,
    Urls,
    receive,
    send,
)
from gpu_worker.adapters.packing.rows import RowPacker
from gpu_worker.adapters.priority import lower_priority
from gpu_worker.host_memory import MemoryBudget
from protocol.runtime.service import set_up_logging
from protocol.wire.errors import LorafleetError

logger = logging.getLogger(__name__)

NUM_FETCHES = 16
"""Adapters fetched at once: slow ones delay no fast one. They are packed one by one, but small ones wait for no large
one."""

SMALL_BYTES = 64 << 20
"""Size of the largest file of weights that counts as small."""


class Stores(Protocol):
    """Where adapters come from: a `StoreClient`."""

    base_tokenizer: str  # key of the model's tokenizer.json, "" if it has none or is not known yet

    def set_urls(self, urls: tuple[str, ...]) -> None:
        """Say which stores are alive."""
        ...

    def fetch(self, digest: str, allocate: Allocate = ...) -> FetchedAdapter:
        """Return an adapter's files, whose weights lie in what `allocate` returns. Raises LorafleetError."""
        ...


class LoaderServer:
    """Answers one worker's messages."""

    def __init__(self, worker: socket.socket, stores: Stores, small_bytes: int = SMALL_BYTES) -> None:
        """worker: where answers are sent; its messages are given to `take`. small_bytes: of files that are small."""
        self.packer: RowPacker | None = None  # None: no model is described, adapters are only fetched
        self._worker = worker
        self._stores = stores
        self._small_bytes = small_bytes
        self._fetchers = ThreadPoolExecutor(NUM_FETCHES, thread_name_prefix="fetcher")
        self._packing = (threading.Lock(), threading.Lock())  # of small adapters, and of large ones
        self._memory = MemoryBudget(FETCH_TIMEOUT_S, small_bytes)
        self._sending = threading.Lock()

    def take(self, message: Message) -> None:
        """Act on a message; a `Fetch` is answered later, from another thread."""
        if isinstance(message, Urls):
            self._stores.set_urls(message.urls)
        elif isinstance(message, Describe):
            self.packer = RowPacker(message.sites, message.served)
            self._stores.base_tokenizer = message.tokenizer
        elif isinstance(message, Fetch):
            self._fetchers.submit(self.answer, message)

    def answer(self, request: Fetch) -> None:
        """Fetch an adapter, pack it if it is plain, and send the answer. Raises OSError when the worker is gone."""
        fd: int | None = None
        try:
            message, fd = self._load(request)
        except LorafleetError as error:
            message = Failed(request.number, type(error).__name__, error.message, error.param)
        except BaseException:  # a thread's edge, also for panics of libraries in Rust: the worker must hear of it
            logger.exception("fetching adapter %.12s failed", request.digest)
            message = Failed(request.number, "Internal", f"fetching adapter {request.digest:.12} failed", None)
        try:
            with self._sending:
                send(self._worker, message, fd)
        finally:
            if fd is not None:
                os.close(fd)

    def _load(self, request: Fetch) -> tuple[Message, int]:
        """Return the answer to a request and the descriptor to send with it, which the caller closes."""
        with ExitStack() as undo:
            fetched: list[tuple[mmap.mmap, int]] = []  # what was read into, and its descriptor

            def allocate(num_bytes: int) -> mmap.mmap:
                fd = _anonymous_file(num_bytes, undo)
                memory = mmap.mmap(fd, num_bytes)
                undo.callback(_release, memory)
                fetched.append((memory, fd))
                return memory

            files = self._stores.fetch(request.digest, allocate)
            tokens = OwnTokens.of(files.tokens) if files.tokens is not None else None
            if self.packer is not None and not request.whole:
                packed = self._pack(self.packer, request.number, files, tokens)
                if packed is not None:
                    return packed
            fd = next(fd for memory, fd in fetched if memory is files.weights)
            return Fetched(request.number, files.config, tokens), os.dup(fd)

    def _pack(
        self, packer: RowPacker, number: int, files: FetchedAdapter, tokens: OwnTokens | None
    ) -> tuple[Packed, int] | None:
        """Return a plain adapter's rows and the descriptor of their buffer, None for any other adapter.

        Raises Unavailable where there is no memory for its rows.
        """
        fds: list[int] = []
        with ExitStack() as held, ExitStack() as undo:

            def allocate(num_bytes: int) -> mmap.mmap:
                held.enter_context(self._memory.hold(num_bytes))
                fds.append(_anonymous_file(num_bytes, undo))
                return mmap.mmap(fds[0], num_bytes)

            view = memoryview(files.weights)
            is_large = len(view) > self._small_bytes
            try:
                with self._packing[is_large]:
                    rows = packer.pack(files.config, view, allocate, partial(_drop, files.weights, is_large))
            finally:
                _release(view)
            if rows is None:
                return None
            undo.pop_all()
            return Packed(number, rows.ranks.tobytes(), rows.scales.tobytes(), rows.invocation, tokens), fds[0]


def _release(memory: mmap.mmap | memoryview) -> None:
    """Give up memory, or a view of it, unless an error's traceback still has one; then it ends with that."""
    with suppress(BufferError):
        memory.close() if isinstance(memory, mmap.mmap) else memory.release()


def _drop(memory: Any, is_large: bool, begin: int, end: int) -> None:
    """Give bytes of a large file in memory back to the system: it and its rows are not there twice."""
    if is_large and isinstance(memory, mmap.mmap) and hasattr(mmap, "MADV_REMOVE"):
        first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last:
            with suppress(OSError):  # a file system that cannot
                memory.madvise(mmap.MADV_REMOVE, first, last - first)


def _anonymous_file(num_bytes: int, undo: ExitStack) -> int:
    """Return the descriptor of a file of zeros without a name, in memory where the system can do that.

    `undo` closes it, unless what it holds is taken out again.
    """
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("lorafleet-adapter")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    undo.callback(os.close, fd)
    os.truncate(fd, num_bytes)
    return fd


def main() -> None:
    """Serve the worker whose socket is the descriptor given as the argument, until it ends."""
    # Signals to the process group are for the worker: when it ends, the loader does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    lower_priority()
    worker = socket.socket(fileno=int(sys.argv[1]))
    try:
        received = receive(worker)
        assert received is not None
        assert isinstance(received[0], Start)
        set_up_logging("loader", logging.getLevelName(received[0].log_level), received[0].log_format)
        server = LoaderServer(worker, StoreClient(received[0].bearer))
        while received := receive(worker):
            server.take(received[0])
    except ConnectionError as error:
        logger.debug("the worker is gone: %r", error)
    os._exit(0)  # fetches under way end too


if __name__ == "__main__":
    main()
