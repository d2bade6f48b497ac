"""Memory for the rows of future adapters, allocated while a core is idle.

First use of memory is expensive, above all in a virtual machine, whose host must find the pages: 10 ms for an adapter
of 4.9 MB, whose rows are then written in 1 ms. So a process that runs only on idle cores (SCHED_IDLE) creates files
with allocated pages. It is not a thread: a descheduled thread that held the GIL would block all others.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from gpu_worker.adapters.loader.memory import new_file, rounded

RESERVE_BYTES = 32 << 20
"""Maximum total bytes in reserve and requested."""

NUM_ASKED = 2
"""Files requested when one is taken, so that the reserve grows while adapters are loaded."""

_SIZE_BYTES = 8  # message: a file's size; the answer repeats it, with the file

logger = logging.getLogger(__name__)


class MemoryReserve:
    """Anonymous files with allocated memory. Methods may be called from any thread."""

    def __init__(self, max_bytes: int = RESERVE_BYTES) -> None:
        """Do not start the process yet; the reserve is empty until then.

        max_bytes: limit for files in reserve and requested.
        """
        self.pid = 0  # id of the helper process
        self._max_bytes = max_bytes
        self._files: list[tuple[int, int]] = []  # (size, descriptor), oldest first
        self._asked: Counter[int] = Counter()  # outstanding requests by size
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()

    def start(self, in_child: Callable[[], object] = lambda: None) -> None:
        """Start the process, a fork that ends with this process. Linux only.

        in_child: called first in the child, to close what must close when this process ends. If the system allows no
        more processes, the reserve stays empty.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self.pid = os.fork()
            except OSError as error:
                logger.warning("memory for adapters is not preallocated: %r", error)
                ours.close()
                return
            if not self.pid:
                try:
                    ours.close()
                    in_child()
                    _make_files(theirs)
                finally:
                    os._exit(0)
        ours.setblocking(False)
        self._socket = ours

    @property
    def num_bytes(self) -> int:
        """Bytes in reserve or requested."""
        return sum(size for size, _ in self._files) + sum(size * num for size, num in self._asked.items())

    def take(self, num_bytes: int) -> int | None:
        """Return the descriptor of a file with memory for `num_bytes`, which the caller closes; None if there is none.

        The file holds zeros and has the size that `rounded` returns. More files of this size are requested.
        """
        size = rounded(num_bytes)
        own: tuple[int, int] | None = None
        with self._lock:
            try:
                self._receive()
                own = next((file for file in self._files if file[0] == size), None)
                if own is not None:
                    self._files.remove(own)
                self._ask(size)
            except OSError as error:
                logger.warning("memory for adapters is no longer preallocated: %r", error)
                self._end()
            return None if own is None else own[1]

    def _receive(self) -> None:
        """Collect the files that have arrived. Raises OSError if the process has ended."""
        while self._socket is not None:
            try:
                message, fds, *_ = socket.recv_fds(self._socket, _SIZE_BYTES, 1)
            except BlockingIOError:
                return
            if not message:
                raise ConnectionResetError("the process that makes files has ended")
            size = int.from_bytes(message, "little")
            self._asked[size] -= 1
            self._files += [(size, fd) for fd in fds]  # none if the system had no memory

    def _ask(self, size: int) -> None:
        """Request files of a size within the limit; files of other sizes are closed if there is none of this size.

        Raises OSError if the process has ended.
        """
        if self._socket is None or size > self._max_bytes:
            return
        if not self._asked[size] and all(own != size for own, _ in self._files):
            while self._files and self.num_bytes + size > self._max_bytes:
                os.close(self._files.pop(0)[1])
        for _ in range(NUM_ASKED):
            if self.num_bytes + size <= self._max_bytes:
                self._socket.send(size.to_bytes(_SIZE_BYTES, "little"))
                self._asked[size] += 1

    def _end(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket = None
        self._asked.clear()

    def close(self) -> None:
        """End the process, and close the files in reserve."""
        with self._lock:
            self._end()
            while self._files:
                os.close(self._files.pop()[1])
            if self.pid:
                os.waitpid(self.pid, 0)
                self.pid = 0


def _make_files(asked: socket.socket) -> None:
    """Create a file for each requested size, until the socket closes."""
    with suppress(PermissionError):  # a container may forbid it
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    while message := asked.recv(_SIZE_BYTES):
        fd = new_file()
        try:
            os.posix_fallocate(fd, 0, int.from_bytes(message, "little"))
        except OSError:
            asked.send(message)
        else:
            socket.send_fds(asked, [message], [fd])
        finally:
            os.close(fd)
