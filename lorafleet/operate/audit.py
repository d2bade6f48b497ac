"""`lorafleet audit` lists the actions of operators, newest first."""

from __future__ import annotations

import argparse
from datetime import datetime
from itertools import islice
from typing import Any

from lorafleet.shared.api import Api, add_flags, add_json_flag, print_json
from lorafleet.shared.parser import Parser, number
from lorafleet.shared.tables import print_list

PATH = "/v1/audit"
PAGE = 1000
COLUMNS = ("time", "key", "tenant", "address", "action", "target", "details", "outcome")


def add_arguments(parser: Parser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.add_argument("--limit", type=number, default=50, help="maximum number listed (default: %(default)s)")
    parser.add_argument("--tenants", action="store_true", help="show tenants' actions on their adapters instead")
    add_json_flag(parser)
    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code. Raises the fleet's error response, and Unavailable."""
    by = "tenants" if args.tenants else "operators"
    with Api(args) as api:
        found = list(islice(api.pages(PATH, limit=min(args.limit, PAGE), by=by), args.limit))
    if args.json:
        print_json(found)
    else:
        print_list(COLUMNS, list(map(_row, found)), "no actions")
    return 0


def _row(entry: dict[str, Any]) -> list[str]:
    when = datetime.fromtimestamp(entry["ms"] / 1000).isoformat(" ", "seconds")
    return [when, entry["who"] or "-", entry["tenant"] or "-", entry["address"] or "-", entry["action"],
            entry["target"], entry["detail"], entry["outcome"]]  # fmt: skip
