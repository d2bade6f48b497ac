"""What a fleet writes is its user's alone: adapters, prompts in the queue's file, logs, secrets."""

from __future__ import annotations

import functools
import logging
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from protocol.wire.errors import Internal

logger = logging.getLogger(__name__)

UMASK = 0o077


def use_private_umask() -> None:
    """Let nobody else read what this process and its children write. Every program calls it before it writes."""
    os.umask(UMASK)


def private_folder(folder: Path) -> Path:
    """Make a folder that only this user may enter, or close one that others may; return it.

    Closing the folder also closes what an earlier version left in it. Another user's folder stays as it is, with a
    warning. Raises OSError when the folder cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not close_to_others(folder):
        logger.warning("%s can be entered by other users, and belongs to one of them", folder)
    return folder


def claimed_folder(folder: Path) -> Path:
    """Make or close a folder of this user in one where everybody may write, such as the temporary folder; return it.

    Nothing changes where another user was here first: with a folder, or with a link to a folder of this user, which
    then would be closed. Raises Internal in that case, and OSError when the folder cannot be made.
    """
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700, parents=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise Internal(f"{folder} is not a folder, or belongs to another user")
    close_to_others(folder)
    return folder


def close_to_others(path: Path) -> bool:
    """Take the rights to a file or folder from everybody else; return whether nobody else has any now."""
    found = path.stat()
    mode = stat.S_IMODE(found.st_mode)
    if mode & UMASK and found.st_uid == os.geteuid():
        path.chmod(mode & ~UMASK)
        logger.warning("%s was accessible to other users (mode %o): removed their access", path, mode)
        mode &= ~UMASK
    return not mode & UMASK


WRITTEN_BY_OTHERS = 0o022


def is_own(path: Path) -> bool:
    """Return whether a file or folder is there that this user or root owns, and nobody else may write. No link is."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return not stat.S_ISLNK(found.st_mode) and _is_closed(found)


def _is_closed(found: os.stat_result) -> bool:
    return found.st_uid in (os.geteuid(), 0) and not stat.S_IMODE(found.st_mode) & WRITTEN_BY_OTHERS


def own_folder(folder: Path) -> Path:
    """Return a folder for what programs run or believe unseen: one where nobody else can have put a file from now on.

    That is the folder itself, made if it is not there, where it is this user's or root's; if it is the user's it is
    closed to others' writing. In one of somebody else's, or of everybody, it is a folder of this user's own, and if
    that is somebody else's as well, one that is new at each start. What lies there from before is for `is_own` to see.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid == os.geteuid() and not _is_closed(found):
            folder.chmod(stat.S_IMODE(found.st_mode) & ~WRITTEN_BY_OTHERS)
            logger.warning("%s was writable by other users: removed their access", folder)
            return folder
    except OSError:  # it cannot be created, so it is empty; a later write to it fails with the reason
        return folder
    if _is_closed(found):
        return folder
    own = folder / f"own-{os.geteuid()}"
    try:
        own.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return _new_folder(folder)
    return own if is_own(own) else _new_folder(folder)


@functools.cache
def _new_folder(instead_of: Path) -> Path:
    new = Path(tempfile.mkdtemp(prefix="lorafleet-cache-"))
    logger.warning("%s belongs to another user: using %s instead until this process ends", instead_of, new)
    return new
