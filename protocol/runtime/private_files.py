"""What a fleet writes is its user's alone: adapters, prompts in the queue's file, logs, secrets."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

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


def close_to_others(path: Path) -> bool:
    """Take the rights to a file or folder from everybody else; return whether nobody else has any now."""
    found = path.stat()
    mode = stat.S_IMODE(found.st_mode)
    if mode & UMASK and found.st_uid == os.geteuid():
        path.chmod(mode & ~UMASK)
        logger.warning("%s was open to other users (mode %o): closed it", path, mode)
        mode &= ~UMASK
    return not mode & UMASK
