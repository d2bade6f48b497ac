"""Fetches, checks and packs adapters in a separate process, at low priority.

Each adapter takes some ten milliseconds of Python, during which the engine's thread would wait for the GIL after every
operation. The result is in shared memory and costs the worker one message. The process ends when its socket closes,
however the worker ends. If it dies first, it is restarted and the request repeated.
"""

from __future__ import annotations

import itertools
import logging
import mmap
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import Future
from contextlib import suppress

import numpy as np

from gpu_worker.adapters.loader.fetch import FetchedAdapter
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
from gpu_worker.adapters.packing.rows import PackedRows, RowSite
from protocol.runtime.environment import child_environment
from protocol.runtime.service import log_format
from protocol.wire import errors
from protocol.wire.errors import Internal, LorafleetError, Unavailable
from protocol.wire.messages import ServedModel

logger = logging.getLogger(__name__)

MAX_DEATHS = 3
"""Loader processes that may die during the fetch of one adapter before the fetch fails."""


class _Died(Exception):
    """The process ended before it answered."""


class Loader:
    """A `StoreClient` in another process. Methods may be called from any thread."""

    def __init__(self, bearer: str = "") -> None:
        """Do not start the process yet: its first message starts it, in time to be ready when needed.

        Until then the worker reads its model, which keeps the cores busy. bearer: the token for the stores,
        `FleetSecret.bearer`.
        """
        self._bearer = bearer
        self._told: dict[type[Message], Message] = {}  # state messages to replay to a new process
        self._lock = threading.Lock()
        self._closed = False
        self._process: _Process | None = None

    @property
    def pid(self) -> int:
        """The id of the latest process, which is started if there was none."""
        process = self._process or self._living()
        return process.popen.pid

    def set_urls(self, urls: tuple[str, ...]) -> None:
        """Set the URLs of the stores that are alive."""
        self._tell(Urls(urls))

    def describe(self, sites: list[RowSite], served: ServedModel) -> None:
        """Set the model for which adapters are packed."""
        self._tell(Describe(sites, served))

    def _tell(self, message: Message) -> None:
        with self._lock:
            if self._told.get(type(message)) != message:
                self._told[type(message)] = message
                if self._process is not None:
                    self._process.tell(message)
                elif not self._closed:
                    self._start()

    def fetch(self, digest: str) -> FetchedAdapter | PackedRows:
        """Return an adapter's rows, or its files if it has more than rows or no model is set yet.

        Blocks. Raises Unavailable when no store answers, NotFound when none has the adapter, AdapterRefused, Internal.
        """
        return self._ask(digest, whole=False)

    def fetch_files(self, digest: str) -> FetchedAdapter:
        """Return an adapter's files. Blocks and raises like `fetch`."""
        files = self._ask(digest, whole=True)
        assert isinstance(files, FetchedAdapter)
        return files

    def _ask(self, digest: str, *, whole: bool) -> FetchedAdapter | PackedRows:
        for _ in range(MAX_DEATHS):
            try:
                return self._living().ask(digest, whole=whole).result()
            except _Died:
                logger.warning("the loader process died while it fetched adapter %.12s", digest)
        raise Internal(f"the loader process died {MAX_DEATHS} times while it fetched adapter {digest:.12}")

    def _living(self) -> _Process:
        """Return the process, starting a new one if the last has ended. Raises Unavailable after `close`."""
        with self._lock:
            if self._closed:
                raise Unavailable("the worker is stopping")
            if self._process is not None and not self._process.ended:
                return self._process
            if self._process is not None:
                self._process.close()
            return self._start()

    def _start(self) -> _Process:
        self._process = _Process(self._bearer)
        for message in self._told.values():
            self._process.tell(message)
        return self._process

    def close(self) -> None:
        """End the process and wait for it; fetches in progress raise Unavailable."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.close()


class _Process:
    """One loader process, seen from the worker."""

    def __init__(self, bearer: str) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "gpu_worker.adapters.loader.process", str(theirs.fileno())]
            self.popen = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=child_environment()
            )
        self._numbers = itertools.count()
        self._sending = threading.Lock()
        self._asked: dict[int, Future[FetchedAdapter | PackedRows]] = {}
        self._asking = threading.Lock()
        self.ended = False  # guarded by _asking
        self._receiver = threading.Thread(target=self._receive, name="loader", daemon=True)
        self._receiver.start()
        self.tell(Start(bearer, logging.getLogger().getEffectiveLevel(), log_format()))

    def tell(self, message: Message) -> None:
        """Send a message. Raises nothing if the process has ended: check `ended`."""
        with self._sending:
            try:
                send(self._socket, message)
            except OSError as error:
                logger.debug("the loader process accepts no more messages: %r", error)

    def ask(self, digest: str, *, whole: bool) -> Future[FetchedAdapter | PackedRows]:
        """Request an adapter. `_Died` is raised, here or by the future, if the process ends before it answers."""
        future: Future[FetchedAdapter | PackedRows] = Future()
        number = next(self._numbers)
        with self._asking:
            if self.ended:
                raise _Died
            self._asked[number] = future
        self.tell(Fetch(number, digest, whole))
        return future

    def _receive(self) -> None:
        """Resolve futures until the process ends or sends an unreadable message, then fail the remaining ones."""
        try:
            while received := receive(self._socket):
                self._settle(*received)
        except OSError as error:
            logger.debug("the loader process has ended: %r", error)
        except BaseException:  # the thread's edge: waiting callers must get the error
            logger.exception("the loader process sent an unreadable message; starting another")
            self.popen.kill()
        with self._asking:
            self.ended = True
            asked, self._asked = self._asked, {}
        for future in asked.values():
            future.set_exception(_Died())

    def _settle(self, message: Message, fd: int | None) -> None:
        assert isinstance(message, Fetched | PackedAdapter | Failed)
        with self._asking:
            future = self._asked.pop(message.number)
        try:
            future.set_result(self._content(message, fd))
        except LorafleetError as error:
            future.set_exception(error)
        except BaseException as error:  # such as failure to map it: the adapter's requests must get the error
            logger.exception("cannot receive an adapter from the loader process")
            future.set_exception(Internal(f"cannot receive an adapter from the loader process: {error!r}"))

    def _content(self, message: Fetched | PackedAdapter | Failed, fd: int | None) -> FetchedAdapter | PackedRows:
        """Return the loader process's answer.

        Raises the error that it sent, or OSError if its memory cannot be mapped.
        """
        if isinstance(message, Failed):
            raise _rebuild(message)
        assert fd is not None
        try:
            memory = memoryview(mmap.mmap(fd, 0))
        finally:
            os.close(fd)
        if isinstance(message, Fetched):
            return FetchedAdapter(message.config, memory, message.added)
        ranks, scales = np.frombuffer(message.ranks, np.int32), np.frombuffer(message.scales, np.float32)
        return PackedRows(memory, ranks.copy(), scales.copy(), message.invocation, message.added)

    def close(self) -> None:
        """End the process and wait for its end."""
        with self._sending, suppress(OSError):  # raised if it has ended already
            self._socket.shutdown(socket.SHUT_RDWR)
        self.popen.wait()
        self._receiver.join()
        self._socket.close()


def _rebuild(failed: Failed) -> LorafleetError:
    """Return the error that was raised in the loader process."""
    kind = getattr(errors, failed.error)
    if kind is errors.AdapterRefused:
        return errors.AdapterRefused([failed.message])
    return kind(failed.message, param=failed.param)
