"""`lorafleet logs` shows the logs of a fleet's services on this machine."""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from lorafleet.launcher import records
from lorafleet.shared.parser import Parser, suggestion
from protocol.wire.errors import BadRequest

POLL_S = 0.2
TAIL_BYTES = 1 << 20
"""Bytes at the end of a log that are searched for the last lines."""


def add_arguments(parser: Parser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.add_argument(
        "services", metavar="SERVICE", nargs="*", help="gateway, scheduler, store, worker-0, … (default: all)"
    )
    parser.add_argument(
        "-n", "--lines", type=int, default=20, metavar="N", help="last lines per service (default: %(default)s)"
    )
    parser.add_argument("-f", "--follow", action="store_true", help="continue with new lines until the fleet stops")
    parser.add_argument("--url", default="", help=records.URL_HELP)


def run(args: argparse.Namespace) -> int:
    """Print the lines; return the exit code. Raises BadRequest for an unknown service."""
    fleet = records.chosen(args.url)
    logs = {path.stem: path for path in sorted(Path(fleet.logs).glob("*.log"))}
    for name in args.services:
        if name not in logs:
            raise BadRequest(f"no service {name}; services: {', '.join(logs)}{suggestion(name, list(logs))}")
    names = args.services or list(logs)
    width = max(map(len, names), default=0) if len(names) > 1 else 0
    files = {name: logs[name].open("rb") for name in names}
    try:
        for name, file in files.items():
            _print(name, _last(file, args.lines), width)
        while args.follow and records.is_running(fleet):
            time.sleep(POLL_S)
            for name, file in files.items():
                _print(name, _new(file), width)
    finally:
        for file in files.values():
            file.close()
    return 0


def _last(file: BinaryIO, num: int) -> Sequence[str]:
    file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
    return deque((line.decode(errors="replace").rstrip("\n") for line in file), maxlen=max(num, 0))


def _new(file: BinaryIO) -> Sequence[str]:
    """Return the complete new lines; from the beginning, if the log was truncated."""
    at = file.tell()
    if file.seek(0, 2) < at:
        at = 0
    file.seek(at)
    whole, newline, _ = file.read().rpartition(b"\n")
    file.seek(at + len(whole) + len(newline))
    return whole.decode(errors="replace").split("\n") if newline else ()


def _print(name: str, lines: Sequence[str], width: int) -> None:
    for line in lines:
        print(f"{name:{width}}  {line}" if width else line, flush=True)
