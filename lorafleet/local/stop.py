"""`lorafleet stop` stops a fleet that `lorafleet up` runs on this machine."""

from __future__ import annotations

import argparse
import os
import signal
import time
from contextlib import suppress

from lorafleet.launcher import records
from lorafleet.shared.parser import Parser

POLL_S = 0.1


def add_arguments(parser: Parser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.add_argument("--url", default="", help=records.URL_HELP)
    parser.add_argument("--now", action="store_true", help="stop immediately instead of finishing accepted requests")


def run(args: argparse.Namespace) -> int:
    """Stop the fleet and wait for its end; return the exit code. Raises BadRequest if none is chosen."""
    fleet = records.chosen(args.url)
    _send(fleet, signal.SIGTERM)
    if args.now:
        _send(fleet, signal.SIGINT)  # not SIGTERM again: of two pending signals of a kind, a process gets one
    else:
        print(f"stopping {fleet.url}: finishing accepted requests; `lorafleet stop --now` does not wait", flush=True)
    while records.is_running(fleet):
        time.sleep(POLL_S)
    print(f"{fleet.url} has stopped")
    return 0


def _send(fleet: records.LocalFleet, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it has just ended by itself
        os.kill(fleet.pid, number)
