"""Passwords for the users of a queue, in one file each, and the ACL file for its server."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from protocol.queue.users import SERVERS, acl, table
from protocol.runtime.fleet_secret import read_or_make

ACL_FILE = Path("queue") / "users.acl"
"""Path of the ACL file that `make_users` writes. It has hashes of random passwords, which reveal no password."""


def password_file(folder: Path, user: str) -> Path:
    """Return the file with a user's password. Each is in its own folder, to be given to one service."""
    return folder / user / "password"


def make_users(folder: Path, acl_mode: int = 0o600, *, replicated: bool = False, console_keys: bool = False) -> Path:
    """Create the missing passwords in `folder`, write the ACL file and return its path. Raises OSError.

    replicated: include users for replicas and Sentinels. console_keys: gateways may write API keys, see `users.table`.
    """
    users = [*table(), *(SERVERS if replicated else ())]
    passwords = {user: read_or_make(password_file(folder, user)) for user in users}
    path = folder / ACL_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w") as file:
        os.fchmod(fd, acl_mode)
        file.write(acl(passwords, console_keys=console_keys))
    draft.rename(path)
    return path
