"""Adapters are fetched, checked and packed in a process of their own, at low priority.

Each is some ten milliseconds of Python, during which the engine's thread would wait for the interpreter after every
operation of its steps. What comes back lies in shared memory and costs the worker a message. The process ends when its
socket does, however the worker ends; if it dies first, it is started again and asked again.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np

from gpu_worker.adapters.fetch import FetchedAdapter, StoreClient
from gpu_worker.adapters.priority import lower_priority
from gpu_worker.adapters.rows import RowPacker, Rows, RowSite
from protocol.runtime.service import log_format, set_up_logging
from protocol.wire import errors
from protocol.wire.errors import Internal, LorafleetError, Unavailable
from protocol.wire.messages import ServedModel

logger = logging.getLogger(__name__)

NICE = 19
"""Counts where `lower_priority` does nothing."""

NUM_FETCHES = 16
"""Adapters on their way at once: slow ones keep no fast one waiting. They are packed one by one."""

MAX_DEATHS = 3
"""Loaders that may die under one adapter."""


class Start(msgspec.Struct, tag=True):
    bearer: str
    log_level: int
    log_format: str


class Urls(msgspec.Struct, tag=True):
    urls: tuple[str, ...]


class Describe(msgspec.Struct, tag=True):
    """The model that adapters are for; what comes before it is fetched, not packed."""

    sites: list[RowSite]
    served: ServedModel
    tokenizer: str  # hash of the model's tokenizer.json: who brings the same brings none


class Fetch(msgspec.Struct, tag=True):
    number: int
    digest: str
    whole: bool = False  # the files themselves are wanted


class Fetched(msgspec.Struct, tag=True):
    """Comes with the descriptor of the weights file."""

    number: int
    config: dict[str, Any]
    tokenizer: str


class Packed(msgspec.Struct, tag=True):
    """Comes with the descriptor of the rows."""

    number: int
    ranks: bytes  # int32 [sites]
    scales: bytes  # float32 [sites]
    invocation: tuple[int, ...]
    tokenizer: str


class Failed(msgspec.Struct, tag=True):
    number: int
    error: str  # its class in protocol.wire.errors
    message: str
    param: str | None


Message = Start | Urls | Describe | Fetch | Fetched | Packed | Failed


class _Died(Exception):
    """The process ended before it answered."""


class Loader:
    """A `StoreClient` in another process. Methods may be called from any thread."""

    def __init__(self, bearer: str = "") -> None:
        """`bearer` is what the stores want to see, `FleetSecret.bearer`."""
        self._bearer = bearer
        self._told: dict[type[Message], Message] = {}  # what every process must know
        self._lock = threading.Lock()
        self._closed = False
        self._process = _Process(bearer)  # now, to have imported everything when it is needed

    @property
    def pid(self) -> int:
        return self._process.popen.pid

    def set_urls(self, urls: tuple[str, ...]) -> None:
        """Say which stores are alive."""
        self._tell(Urls(urls))

    def describe(self, sites: list[RowSite], served: ServedModel, tokenizer: str) -> None:
        """Say for which model to pack adapters. tokenizer: hash of its tokenizer.json, see `hash_of`."""
        self._tell(Describe(sites, served, tokenizer))

    def _tell(self, message: Message) -> None:
        with self._lock:
            if self._told.get(type(message)) != message:
                self._told[type(message)] = message
                self._process.tell(message)

    def fetch(self, digest: str) -> FetchedAdapter | Rows:
        """Return an adapter's files, or their rows if that is all there is to them and the model is known.

        Raises Unavailable when no store answers, NotFound when none has it, Internal.
        """
        return self._ask(digest, whole=False)

    def fetch_files(self, digest: str) -> FetchedAdapter:
        """Return an adapter's files. Raises as `fetch`."""
        files = self._ask(digest, whole=True)
        assert isinstance(files, FetchedAdapter)
        return files

    def _ask(self, digest: str, *, whole: bool) -> FetchedAdapter | Rows:
        for _ in range(MAX_DEATHS):
            try:
                return self._living().ask(digest, whole=whole).result()
            except _Died:
                logger.warning("the loader process died while it fetched adapter %.12s", digest)
        raise Internal(f"the loader process died {MAX_DEATHS} times while it fetched adapter {digest:.12}")

    def _living(self) -> _Process:
        with self._lock:
            if self._closed:
                raise Unavailable("the worker is stopping")
            if self._process.ended:
                self._process.close()
                self._process = _Process(self._bearer)
                for message in self._told.values():
                    self._process.tell(message)
            return self._process

    def close(self) -> None:
        """End the process; who waits for a fetch gets Unavailable."""
        with self._lock:
            self._closed = True
            self._process.close()


class _Process:
    """One loader process, seen from the worker."""

    def __init__(self, bearer: str) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "gpu_worker.adapters.loader", str(theirs.fileno())]
            self.popen = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        self._numbers = itertools.count()
        self._sending = threading.Lock()
        self._asked: dict[int, Future[FetchedAdapter | Rows]] = {}
        self._asking = threading.Lock()
        self.ended = False  # guarded by _asking
        self._receiver = threading.Thread(target=self._receive, name="loader", daemon=True)
        self._receiver.start()
        self.tell(Start(bearer, logging.getLogger().getEffectiveLevel(), log_format()))

    def tell(self, message: Message) -> None:
        """Send a message; that the process has ended shows elsewhere."""
        with self._sending:
            try:
                _send(self._socket, message)
            except OSError as error:
                logger.debug("the loader process takes nothing more: %r", error)

    def ask(self, digest: str, *, whole: bool) -> Future[FetchedAdapter | Rows]:
        """Ask for an adapter's files. The future raises `_Died` if the process ends first."""
        future: Future[FetchedAdapter | Rows] = Future()
        number = next(self._numbers)
        with self._asking:
            if self.ended:
                raise _Died
            self._asked[number] = future
        self.tell(Fetch(number, digest, whole))
        return future

    def _receive(self) -> None:
        try:
            while received := _receive(self._socket):
                self._settle(*received)
        except OSError as error:
            logger.debug("the loader process is gone: %r", error)
        with self._asking:
            self.ended = True
            asked, self._asked = self._asked, {}
        for future in asked.values():
            future.set_exception(_Died())

    def _settle(self, message: Message, fd: int | None) -> None:
        assert isinstance(message, Fetched | Packed | Failed)
        with self._asking:
            future = self._asked.pop(message.number)
        if isinstance(message, Failed):
            future.set_exception(_rebuild(message))
        else:
            assert fd is not None
            memory = memoryview(mmap.mmap(fd, 0))
            os.close(fd)
            if isinstance(message, Fetched):
                future.set_result(FetchedAdapter(message.config, memory, message.tokenizer))
            else:
                ranks, scales = np.frombuffer(message.ranks, np.int32), np.frombuffer(message.scales, np.float32)
                future.set_result(Rows(memory, ranks.copy(), scales.copy(), message.invocation, message.tokenizer))

    def close(self) -> None:
        """End the process and wait for that."""
        with self._sending, suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_RDWR)
        self.popen.wait()
        self._receiver.join()
        self._socket.close()


def _rebuild(failed: Failed) -> LorafleetError:
    kind = getattr(errors, failed.error)
    if kind is errors.AdapterRefused:
        return errors.AdapterRefused([failed.message])
    return kind(failed.message, param=failed.param)


# ---------------------------------------------------------------- a length, with it a descriptor, then a message

_decoder = msgspec.msgpack.Decoder(Message)


def _send(to: socket.socket, message: Message, fd: int | None = None) -> None:
    payload = msgspec.msgpack.encode(message)
    socket.send_fds(to, [len(payload).to_bytes(4, "little")], [] if fd is None else [fd])
    to.sendall(payload)


def _receive(source: socket.socket) -> tuple[Message, int | None] | None:
    """Return the next message and the descriptor that came with it, None at the end."""
    head, fds, _, _ = socket.recv_fds(source, 4, 1)
    if not head:
        return None
    head += _read(source, 4 - len(head))
    return _decoder.decode(_read(source, int.from_bytes(head, "little"))), fds[0] if fds else None


def _read(source: socket.socket, count: int) -> bytes:
    content = b""
    while len(content) < count:
        piece = source.recv(count - len(content))
        if not piece:
            raise ConnectionError("the message is cut")
        content += piece
    return content


# ---------------------------------------------------------------- in the loader's process


class _Server:
    """Answers one worker."""

    def __init__(self, worker: socket.socket, bearer: str) -> None:
        self._worker = worker
        self._stores = StoreClient(bearer)
        self._packer: RowPacker | None = None
        self._tokenizer = ""
        self._fetchers = ThreadPoolExecutor(NUM_FETCHES, thread_name_prefix="fetcher")
        self._packing = threading.Lock()
        self._sending = threading.Lock()

    def take(self, message: Message) -> None:
        if isinstance(message, Urls):
            self._stores.set_urls(message.urls)
        elif isinstance(message, Describe):
            self._packer = RowPacker(message.sites, message.served)
            self._tokenizer = message.tokenizer
        elif isinstance(message, Fetch):
            self._fetchers.submit(self._answer, message)

    def _answer(self, order: Fetch) -> None:
        fd: int | None = None
        try:
            message, fd = self._bring(order)
        except LorafleetError as error:
            message = Failed(order.number, type(error).__name__, error.message, error.param)
        except Exception:  # a thread's edge: the worker must hear of it
            logger.exception("fetching adapter %.12s failed", order.digest)
            message = Failed(order.number, "Internal", f"fetching adapter {order.digest:.12} failed", None)
        with self._sending:
            _send(self._worker, message, fd)
        if fd is not None:
            os.close(fd)

    def _bring(self, order: Fetch) -> tuple[Message, int]:
        files = self._stores.fetch(order.digest)
        tokenizer = files.tokenizer if hash_of(files.tokenizer) != self._tokenizer else ""
        if self._packer is not None and not order.whole:
            memory: list[int] = []

            def allocate(num_bytes: int) -> mmap.mmap:
                memory.append(_memory(num_bytes))
                return mmap.mmap(memory[0], num_bytes)

            with self._packing:
                rows = self._packer.pack(files.config, files.weights, allocate)
            if rows is not None:
                ranks, scales = rows.ranks.tobytes(), rows.scales.tobytes()
                return Packed(order.number, ranks, scales, rows.invocation, tokenizer), memory[0]
            for fd in memory:
                os.close(fd)
        fd = _memory(len(files.weights))
        with mmap.mmap(fd, len(files.weights)) as content:
            content.write(files.weights)
        return Fetched(order.number, files.config, tokenizer), fd


def hash_of(tokenizer: str) -> str:
    """Return what tells a tokenizer.json from others."""
    return hashlib.sha256(tokenizer.encode()).hexdigest()


def _memory(num_bytes: int) -> int:
    """Return the descriptor of a file without a name, in memory where the system can do that."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("lorafleet-adapter")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.truncate(fd, num_bytes)
    return fd


def main() -> None:
    """Serve the worker whose socket is the descriptor given, until it ends."""
    # Signals to the whole group are for the worker: its end is the loader's.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.nice(NICE)
    lower_priority()
    worker = socket.socket(fileno=int(sys.argv[1]))
    try:
        received = _receive(worker)
        assert received is not None
        assert isinstance(received[0], Start)
        set_up_logging("loader", logging.getLevelName(received[0].log_level), received[0].log_format)
        server = _Server(worker, received[0].bearer)
        while received := _receive(worker):
            server.take(received[0])
    except ConnectionError as error:
        logger.debug("the worker is gone: %r", error)
    os._exit(0)  # whatever is being fetched


if __name__ == "__main__":
    main()
