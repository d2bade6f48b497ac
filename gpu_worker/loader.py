"""Adapters are fetched and checked in a process of their own, at low priority.

Each is some ten milliseconds of Python, during which the engine's thread would wait for the interpreter after every
operation of its steps. What comes back is a file in memory, which costs the worker a message. The process ends when its
socket does, however the worker ends; if it dies first, it is started again and asked again.
"""

from __future__ import annotations

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

from gpu_worker.fetch import AdapterFiles, StoreClient
from protocol import errors
from protocol.errors import Internal, LorafleetError, Unavailable
from protocol.service import set_up_logging

logger = logging.getLogger(__name__)

NICE = 10
"""Where the cores are busy, the loader gets a tenth of one: steps of warm requests go first."""

NUM_FETCHES = 4
MAX_DEATHS = 3
"""Loaders that may die under one adapter."""


class Start(msgspec.Struct, tag=True):
    bearer: str
    log_level: int


class Urls(msgspec.Struct, tag=True):
    urls: tuple[str, ...]


class Fetch(msgspec.Struct, tag=True):
    number: int
    digest: str


class Fetched(msgspec.Struct, tag=True):
    """Comes with the descriptor of the weights file."""

    number: int
    config: dict[str, Any]


class Failed(msgspec.Struct, tag=True):
    number: int
    error: str  # its class in protocol.errors
    message: str
    param: str | None


Message = Start | Urls | Fetch | Fetched | Failed


class _Died(Exception):
    """The process ended before it answered."""


class Loader:
    """A `StoreClient` in another process. Methods may be called from any thread."""

    def __init__(self, bearer: str = "") -> None:
        """`bearer` is what the stores want to see, `FleetSecret.bearer`."""
        self._bearer = bearer
        self._urls: tuple[str, ...] = ()
        self._lock = threading.Lock()
        self._closed = False
        self._process = _Process(bearer)  # now, to have imported everything when it is needed

    @property
    def pid(self) -> int:
        return self._process.popen.pid

    def set_urls(self, urls: tuple[str, ...]) -> None:
        """Say which stores are alive."""
        with self._lock:
            if urls != self._urls:
                self._urls = urls
                self._process.tell(Urls(urls))

    def fetch(self, digest: str) -> AdapterFiles:
        """Return an adapter's files. Raises Unavailable when no store answers, NotFound when none has it, Internal."""
        for _ in range(MAX_DEATHS):
            try:
                return self._living().ask(digest).result()
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
                self._process.tell(Urls(self._urls))
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
            command = [sys.executable, "-m", "gpu_worker.loader", str(theirs.fileno())]
            self.popen = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        self._numbers = itertools.count()
        self._sending = threading.Lock()
        self._asked: dict[int, Future[AdapterFiles]] = {}
        self._asking = threading.Lock()
        self.ended = False  # guarded by _asking
        self._receiver = threading.Thread(target=self._receive, name="loader", daemon=True)
        self._receiver.start()
        self.tell(Start(bearer, logging.getLogger().getEffectiveLevel()))

    def tell(self, message: Message) -> None:
        """Send a message; that the process has ended shows elsewhere."""
        with self._sending:
            try:
                _send(self._socket, message)
            except OSError as error:
                logger.debug("the loader process takes nothing more: %r", error)

    def ask(self, digest: str) -> Future[AdapterFiles]:
        """Ask for an adapter's files. The future raises `_Died` if the process ends first."""
        future: Future[AdapterFiles] = Future()
        number = next(self._numbers)
        with self._asking:
            if self.ended:
                raise _Died
            self._asked[number] = future
        self.tell(Fetch(number, digest))
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
        assert isinstance(message, Fetched | Failed)
        with self._asking:
            future = self._asked.pop(message.number)
        if isinstance(message, Failed):
            future.set_exception(_rebuild(message))
        else:
            assert fd is not None
            with open(fd, "rb") as file:
                weights = memoryview(mmap.mmap(file.fileno(), 0))
            future.set_result(AdapterFiles(message.config, weights))

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
        self._fetchers = ThreadPoolExecutor(NUM_FETCHES, thread_name_prefix="fetcher")
        self._sending = threading.Lock()

    def take(self, message: Message) -> None:
        if isinstance(message, Urls):
            self._stores.set_urls(message.urls)
        elif isinstance(message, Fetch):
            self._fetchers.submit(self._answer, message)

    def _answer(self, order: Fetch) -> None:
        fd: int | None = None
        try:
            files = self._stores.fetch(order.digest)
            fd = _in_memory(files.weights)
            message: Message = Fetched(order.number, files.config)
        except LorafleetError as error:
            message = Failed(order.number, type(error).__name__, error.message, error.param)
        except Exception:  # a thread's edge: the worker must hear of it
            logger.exception("fetching adapter %.12s failed", order.digest)
            message = Failed(order.number, "Internal", f"fetching adapter {order.digest:.12} failed", None)
        with self._sending:
            _send(self._worker, message, fd)
        if fd is not None:
            os.close(fd)


def _in_memory(content: bytes | memoryview) -> int:
    """Return the descriptor of a file without a name that holds `content`, in memory where the system can do that."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("lorafleet-adapter")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    return fd


def main() -> None:
    """Serve the worker whose socket is the descriptor given, until it ends."""
    # Signals to the whole group are for the worker: its end is the loader's.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.nice(NICE)
    worker = socket.socket(fileno=int(sys.argv[1]))
    try:
        received = _receive(worker)
        assert received is not None
        assert isinstance(received[0], Start)
        set_up_logging("loader", logging.getLevelName(received[0].log_level))
        server = _Server(worker, received[0].bearer)
        while received := _receive(worker):
            server.take(received[0])
    except ConnectionError as error:
        logger.debug("the worker is gone: %r", error)
    os._exit(0)  # whatever is being fetched


if __name__ == "__main__":
    main()
