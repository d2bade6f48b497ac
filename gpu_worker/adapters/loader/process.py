"""The loader process: fetches and packs adapters for one worker until the worker closes its socket."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import partial
from typing import Protocol

from gpu_worker.adapters.loader.fetch import FETCH_TIMEOUT_S, Allocate, FetchedAdapter, StoreClient, Turn
from gpu_worker.adapters.loader.memory import AnonymousFile, KeptFiles, copy_of
from gpu_worker.adapters.loader.messages import (
    Describe,
    Failed,
    Fetch,
    Fetched,
    Message,
    PackedAdapter,
    Start,
    Urls,
    receive,
    send,
)
from gpu_worker.adapters.loader.reserve import MemoryReserve
from gpu_worker.adapters.loader.turns import FifoLock
from gpu_worker.adapters.packing.rows import RowPacker
from gpu_worker.adapters.priority import lower_priority
from gpu_worker.host_memory import MemoryBudget
from protocol.runtime.service import set_up_logging
from protocol.wire.errors import LorafleetError

logger = logging.getLogger(__name__)

NUM_FETCHES = 16
"""Maximum concurrent fetches, so that slow ones do not delay fast ones.

Checking and packing is done one adapter at a time, in request order, but small adapters do not wait for large ones.
"""

SMALL_BYTES = 64 << 20
"""Maximum size of a weights file that counts as small."""


class Stores(Protocol):
    """The source of adapters: a `StoreClient`."""

    def set_urls(self, urls: tuple[str, ...]) -> None:
        """Set the URLs of the stores that are alive."""
        ...

    def fetch(self, digest: str, allocate: Allocate = ..., turn: Turn = ...) -> FetchedAdapter:
        """Return an adapter's files, with the weights in memory from `allocate`. Raises LorafleetError.

        turn: the lock held while they are checked.
        """
        ...


class LoaderServer:
    """Answers one worker's messages."""

    def __init__(
        self,
        worker: socket.socket,
        stores: Stores,
        small_bytes: int = SMALL_BYTES,
        reserve: MemoryReserve | None = None,
    ) -> None:
        """worker: socket for answers; the worker's messages are given to `take`.

        small_bytes: maximum size of a small file. reserve: preallocated memory for rows, if any.
        """
        self.packer: RowPacker | None = None  # None: no model is set, adapters are only fetched
        self._worker = worker
        self._stores = stores
        self._small_bytes = small_bytes
        self._fetchers = ThreadPoolExecutor(NUM_FETCHES, thread_name_prefix="fetcher")
        self._turns = (FifoLock(), FifoLock())  # queues for checking and packing: small adapters, large ones
        self._kept = KeptFiles()
        self._reserve = reserve or MemoryReserve()
        self._memory = MemoryBudget(FETCH_TIMEOUT_S, small_bytes)
        self._sending = threading.Lock()

    def take(self, message: Message) -> None:
        """Process a message; a `Fetch` is answered later, from another thread."""
        if isinstance(message, Urls):
            self._stores.set_urls(message.urls)
        elif isinstance(message, Describe):
            self.packer = RowPacker(message.sites, message.served)
        elif isinstance(message, Fetch):
            self._fetchers.submit(self.answer, message)

    def answer(self, request: Fetch) -> None:
        """Fetch an adapter, pack it if it is plain, and send the answer. Raises OSError if the worker is gone."""
        fd: int | None = None
        try:
            message, fd = self._load(request)
        except LorafleetError as error:
            message = Failed(request.number, type(error).__name__, error.message, error.param)
        except BaseException:  # a thread's top level, also for panics in Rust: the worker must get the error
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
            fetched: list[tuple[memoryview, AnonymousFile]] = []  # views of the fetched data, and their files

            def allocate(num_bytes: int) -> memoryview:
                view, file = self._take(num_bytes, undo)
                fetched.append((view, file))
                return view

            files = self._stores.fetch(request.digest, allocate, partial(self._turn, request.number))
            weights, file = next(pair for pair in fetched if pair[0] is files.weights)
            if self.packer is not None and not request.whole:
                packed = self._pack(self.packer, request.number, files, weights, file)
                if packed is not None:
                    undo.pop_all()
                    for view, file in fetched:
                        _release(view)
                        self._kept.give_back(file)
                    return packed
            return Fetched(request.number, files.config, files.added), file.handed_over(len(weights))

    def _turn(self, number: int, num_bytes: int) -> AbstractContextManager[object]:
        """Serialize CPU-bound work (check, pack) in request order; large and small files queue separately."""
        return self._turns[num_bytes > self._small_bytes].take(number)

    def _take(self, num_bytes: int, undo: ExitStack) -> tuple[memoryview, AnonymousFile]:
        """Return memory with arbitrary content, and its file; `undo` closes both."""
        file = self._kept.take(num_bytes)
        undo.callback(file.close)
        view = file.view(num_bytes)
        undo.callback(_release, view)
        return view, file

    def _pack(
        self, packer: RowPacker, number: int, files: FetchedAdapter, weights: memoryview, file: AnonymousFile
    ) -> tuple[PackedAdapter, int] | None:
        """Return a plain adapter's rows and the descriptor of their buffer, None for any other adapter.

        file: the file that begins with the weights. Raises Unavailable if there is no memory for the rows.
        """
        is_large = len(weights) > self._small_bytes
        with ExitStack() as held, ExitStack() as undo:
            packed: list[tuple[memoryview, AnonymousFile]] = []  # views of the packed data, and their files

            def allocate(num_bytes: int) -> memoryview:
                held.enter_context(self._memory.hold(num_bytes))
                view, file = self._take(num_bytes, undo)
                packed.append((view, file))
                return view

            with self._turn(number, len(weights)):
                rows = packer.pack(files.config, weights, allocate, file.drop if is_large else _keep)
            if rows is None:
                return None
            ((view, to),) = packed
            if self._kept.keeps(to):  # writing whole pages costs less than mapping them first
                fd = copy_of(view, self._reserve.take(len(view)))
                undo.pop_all()
                _release(view)
                self._kept.give_back(to)
            else:
                fd = to.handed_over(len(view))
            return PackedAdapter(number, rows.ranks.tobytes(), rows.scales.tobytes(), rows.invocation, files.added), fd


def _release(view: memoryview) -> None:
    """Release a view of memory; if an error's traceback still has an array in it, the view ends with that."""
    with suppress(BufferError):
        view.release()


def _keep(_begin: int, _end: int) -> None:
    """Do nothing: a file that is reused keeps its pages."""


def main() -> None:
    """Serve the worker on the socket whose descriptor is the argument, until the worker ends."""
    # Signals to the process group are meant for the worker; the loader ends when the worker does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    lower_priority()
    worker = socket.socket(fileno=int(sys.argv[1]))
    try:
        received = receive(worker)
        assert received is not None
        assert isinstance(received[0], Start)
        set_up_logging("loader", logging.getLevelName(received[0].log_level), received[0].log_format)
        reserve = MemoryReserve()
        if sys.platform == "linux":
            reserve.start(worker.close)  # so that the worker sees this process's end by its socket
        server = LoaderServer(worker, StoreClient(received[0].bearer), reserve=reserve)
        while received := receive(worker):
            server.take(received[0])
    except ConnectionError as error:
        logger.debug("the worker has ended: %r", error)
    os._exit(0)  # ends fetches in progress too


if __name__ == "__main__":
    main()
