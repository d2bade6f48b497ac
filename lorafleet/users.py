"""`lorafleet users` creates the users of an external queue: a password file for each, and the server's ACL file."""

from __future__ import annotations

import argparse
from pathlib import Path

from lorafleet.launcher.queue_users import make_users, password_file
from lorafleet.shared.parser import Parser
from protocol.queue.users import SERVERS, table
from protocol.wire.errors import BadRequest


def add_arguments(parser: Parser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.description = (
        "Write FOLDER/queue/users.acl for the queue's server (--aclfile), and a password file FOLDER/USER/password"
        " for each service (--redis-password-file). Existing files are kept."
    )
    parser.add_argument("--replicated", action="store_true", help="also create users for replicas and Sentinels")
    parser.add_argument(
        "--console-keys",
        action="store_true",
        help="let gateways write API keys, which their setting console_keys needs",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder for the passwords and the ACL file")


def run(args: argparse.Namespace) -> int:
    """Create the users; return the exit code. Raises BadRequest if the folder cannot be written."""
    try:
        # The server may run as another user; the file reveals no password.
        acl = make_users(args.folder, acl_mode=0o644, replicated=args.replicated, console_keys=args.console_keys)
        print(acl)
    except OSError as error:
        raise BadRequest(f"cannot write to {args.folder}: {error}") from error
    for user in [*table(), *(SERVERS if args.replicated else ())]:
        print(password_file(args.folder, user))
    return 0
