"""Access to the fleet's files, which only its user may read: adapters, prompts in the queue's file, logs, secrets."""

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
    """Make new files of this process and its children private. Every program calls it before it writes."""
    os.umask(UMASK)


def private_folder(folder: Path) -> Path:
    """Create a folder that only this user may enter, or remove others' access to an existing one; return it.

    This also protects files that an earlier version has left in it. Another user's folder is not changed, with a
    warning. Raises OSError if the folder cannot be created.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not close_to_others(folder):
        logger.warning("%s can be entered by other users, and belongs to one of them", folder)
    return folder


def claimed_folder(folder: Path) -> Path:
    """Create or close a folder of this user in a world-writable folder such as the temporary folder; return it.

    Nothing is changed if another user was first, with a folder, or with a link to a folder of this user, whose access
    would then change. Raises Internal in that case, and OSError if the folder cannot be created.
    """
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700, parents=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise Internal(f"{folder} is not a folder, or belongs to another user")
    close_to_others(folder)
    return folder


def close_to_others(path: Path) -> bool:
    """Remove others' access to a file or folder; return whether they have none now."""
    found = path.stat()
    mode = stat.S_IMODE(found.st_mode)
    if mode & UMASK and found.st_uid == os.geteuid():
        path.chmod(mode & ~UMASK)
        logger.warning("%s was accessible to other users (mode %o): removed their access", path, mode)
        mode &= ~UMASK
    return not mode & UMASK


WRITTEN_BY_OTHERS = 0o022


def is_own(path: Path) -> bool:
    """Return whether a file or folder exists that this user or root owns and no one else may write; False for links."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return not stat.S_ISLNK(found.st_mode) and _is_closed(found)


def _is_closed(found: os.stat_result) -> bool:
    return found.st_uid in (os.geteuid(), 0) and not stat.S_IMODE(found.st_mode) & WRITTEN_BY_OTHERS


def own_folder(folder: Path) -> Path:
    """Return a folder for files that programs trust without a check, into which no one else can put files from now on.

    That is `folder` itself, created if missing, if this user or root owns it; the user's own is closed to others'
    writing. If it belongs to someone else or is writable by all, a subfolder of this user is returned instead. If that
    belongs to someone else too, the folder is a new one at each start. Existing files must be checked with `is_own`.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid == os.geteuid() and not _is_closed(found):
            folder.chmod(stat.S_IMODE(found.st_mode) & ~WRITTEN_BY_OTHERS)
            logger.warning("%s was writable by other users: removed their access", folder)
            return folder
    except OSError:  # it cannot be created, so it is empty; a later write fails with the reason
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
