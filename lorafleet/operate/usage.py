"""`lorafleet usage` reports usage by day, tenant and model."""

from __future__ import annotations

import argparse
import time

from lorafleet.shared.api import Api, add_flags, add_json_flag, print_json
from lorafleet.shared.parser import Parser
from lorafleet.shared.tables import print_list

PATH = "/v1/usage"
DAY_S = 86_400
GROUPS = ("project_id", "model", "batch", "adapter", "base_model")
COUNTS = ("num_model_requests", "input_tokens", "input_cached_tokens", "output_tokens")


def add_arguments(parser: Parser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.add_argument("--days", type=int, default=7, metavar="N", help="number of days, today included (%(default)s)")
    parser.add_argument(
        "--by",
        default="project_id,model",
        metavar="NAMES",
        help=f"columns to group by, comma-separated: {', '.join(GROUPS)} (%(default)s); project_id is the tenant",
    )
    parser.add_argument("--csv", action="store_true", help="print CSV")
    add_json_flag(parser)
    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code. Raises what the fleet refuses, and Unavailable."""
    start_s = (int(time.time()) // DAY_S - args.days + 1) * DAY_S
    by = [name for name in args.by.split(",") if name]
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
        print_list(("day", *by, "requests", "prompt tokens", "cached", "output tokens"), rows, "no usage")
    return 0
