"""The records by which a user's commands find the fleets that `lorafleet up` runs on this machine.

Each fleet writes a record to a folder that only its user may enter, and locks the record while it runs. A record
without a lock belongs to a fleet that was killed.
"""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from protocol.runtime.private_files import claimed_folder, is_own
from protocol.wire.brief import brief
from protocol.wire.errors import BadRequest, Internal

logger = logging.getLogger(__name__)

URL_VARIABLE = "LORAFLEET_URL"
"""Environment variable with the URL of the gateway that commands use."""

URL_HELP = f"URL of the fleet, if several run (default: ${URL_VARIABLE}, or the only one)"

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1", "0.0.0.0"})

NO_FLEET = "no fleet runs on this machine; start one with `lorafleet up MODEL`"


class LocalFleet(msgspec.Struct, frozen=True):
    """A running fleet."""

    pid: int  # process id of `lorafleet up`
    url: str  # URL of its gateway
    model: str  # name of the base model in the API
    data: str  # data folder
    logs: str  # folder of the services' logs
    started_s: float  # unix time
    key_file: str = ""  # file with an API key for this user; "": the fleet requires none


def _folder() -> Path:
    """Return the folder of the records. Raises OSError if it needs a temporary folder and there is none."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "lorafleet" if runtime else Path(tempfile.gettempdir()) / f"lorafleet-{os.getuid()}"


@contextmanager
def registered(fleet: LocalFleet) -> Generator[None]:
    """Let other commands find a fleet while the block runs; only warn if its record cannot be written.

    The folder's parent may be missing, full, or writable by everyone.
    """
    try:
        path, fd = _write(fleet)
    except (OSError, Internal) as error:
        logger.warning("other commands find this fleet only by --url: its record cannot be written: %s", error)
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError):  # without the lock it is a stale record
            path.unlink()
        os.close(fd)


def _write(fleet: LocalFleet) -> tuple[Path, int]:
    """Write a fleet's record; return its path and the file descriptor that holds its lock. Raises OSError, Internal."""
    path = claimed_folder(_folder()) / f"{fleet.pid}.json"
    draft = path.with_suffix(".part")
    fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.write(fd, msgspec.json.encode(fleet))
        draft.rename(path)
    except OSError:
        draft.unlink(missing_ok=True)
        os.close(fd)
        raise
    return path, fd


def running() -> list[LocalFleet]:
    """Return this user's running fleets, the oldest first; delete the records of killed ones.

    Returns none if the folder of the records is missing, unreadable, or writable by another user.
    """
    paths: list[Path] = []
    with suppress(OSError):
        if is_own(_folder()):
            paths = list(_folder().glob("*.json"))
    found: list[LocalFleet] = []
    for path in paths:
        with suppress(OSError, msgspec.MsgspecError):  # it has just ended, or belongs to another user or release
            fleet = _read(path)
            if fleet is not None:
                found.append(fleet)
    return sorted(found, key=lambda fleet: fleet.started_s)


def _read(path: Path) -> LocalFleet | None:
    """Return the fleet of a record; if it no longer runs, delete the record and return None."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return msgspec.json.decode(path.read_bytes(), type=LocalFleet)
        path.unlink(missing_ok=True)
        return None
    finally:
        os.close(fd)


def is_running(fleet: LocalFleet) -> bool:
    """Return whether a fleet still runs."""
    return fleet in running()


def the_only(flag: str = "--url") -> LocalFleet | None:
    """Return the fleet that runs on this machine, None without one. Raises BadRequest if there are several.

    flag: the command's flag to choose a fleet, for the error message.
    """
    fleets = running()
    if len(fleets) > 1:
        listed = ", ".join(f"{fleet.url} ({fleet.model}, data in {fleet.data})" for fleet in fleets)
        raise BadRequest(f"{len(fleets)} fleets run on this machine: {listed}; choose one with {flag}")
    return fleets[0] if fleets else None


def at(url: str) -> LocalFleet | None:
    """Return the local fleet with this URL, by any name of this machine. Raises BadRequest."""
    return next((fleet for fleet in running() if _address(fleet.url) == _address(url)), None)


def is_here(url: str) -> bool:
    """Return whether the host of a URL is one of the names in LOOPBACK, for this machine. Raises BadRequest."""
    return _address(url)[0] == "localhost"


def _address(url: str) -> tuple[str, int | None]:
    """Return host and port of a URL, "localhost" for this machine. Raises BadRequest for an invalid URL."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").lower()
        return "localhost" if host in LOOPBACK else host, parts.port
    except ValueError as error:
        raise BadRequest(f"--url {brief(url)}: {error}") from error


def chosen(url: str) -> LocalFleet:
    """Return the local fleet with this URL; "": the one in LORAFLEET_URL, else the only one.

    Raises BadRequest.
    """
    url = url or os.environ.get(URL_VARIABLE, "")
    fleet = at(url) if url else the_only()
    if fleet is not None:
        return fleet
    if not url:
        raise BadRequest(NO_FLEET)
    raise BadRequest(f"no fleet of this machine has the URL {url}; `lorafleet status` lists them")


def age_text(fleet: LocalFleet) -> str:
    """Return how long a fleet has run, with a unit."""
    seconds = int(time.time() - fleet.started_s)
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
