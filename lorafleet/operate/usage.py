"""`lorafleet usage` reports usage by day, tenant and model."""

from __future__ import annotations

import argparse
import time

from lorafleet.shared.api import Api, add_flags, add_json_flag, print_json
from lorafleet.shared.parser import Parser, suggestion
from lorafleet.shared.tables import print_list
from protocol.wire.brief import brief

PATH = "/v1/usage"
DAY_S = 86_400
GROUPS = ("tenant", "model", "batch", "adapter", "base_model")
API_NAMES = {"tenant": "project_id"}
"""Column -> its name in OpenAI's usage API, if that differs."""

MAX_DAYS = 31
"""Maximum number of days in one response of the API."""

COUNTS = ("num_model_requests", "input_tokens", "input_cached_tokens", "output_tokens")


def add_arguments(parser: Parser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.add_argument(
        "--days",
        type=_days,
        default=7,
        metavar="N",
        help=f"number of days, today included: 1 to {MAX_DAYS} (default: %(default)s)",
    )
    parser.add_argument(
        "--by",
        type=_columns,
        default="tenant,model",
        metavar="NAMES",
        help=f"columns to group by, comma-separated: {', '.join(GROUPS)} (default: %(default)s)",
    )
    parser.add_argument("--csv", action="store_true", help="print CSV")
    add_json_flag(parser)
    add_flags(parser)


def _days(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 2 or not 1 <= int(text) <= MAX_DAYS:
        raise argparse.ArgumentTypeError(f"{brief(text)} is not a number from 1 to {MAX_DAYS}")
    return int(text)


def _columns(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in GROUPS:
            raise argparse.ArgumentTypeError(
                f"{brief(name)} is not one of {', '.join(GROUPS)}{suggestion(name, GROUPS)}"
            )
    return names


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code. Raises the fleet's error response, and Unavailable."""
    start_s = (int(time.time()) // DAY_S - args.days + 1) * DAY_S
    by = [API_NAMES.get(name, name) for name in args.by]
    params = {"start_time": start_s, "limit": args.days, "group_by": by, "format": "csv" if args.csv else "json"}
    with Api(args) as api:
        answer = api.request("GET", PATH, params=params)
    if args.csv:
        print(answer.text, end="")
    elif args.json:
        print_json(answer.json())
    else:
        rows = [
            [
                time.strftime("%Y-%m-%d", time.gmtime(bucket["start_time"])),
                *(str(one[name]) for name in by),
                *(str(one[name]) for name in COUNTS),
            ]
            for bucket in answer.json()["data"]
            for one in bucket["results"]
        ]
        print_list(("day", *args.by, "requests", "input tokens", "cached", "output tokens"), rows, "no usage")
    return 0
