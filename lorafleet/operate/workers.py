"""`lorafleet workers` lists, drains and resumes the workers of a running fleet."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from lorafleet.shared.api import Api, add_flags, add_json_flag, in_path, run_action
from lorafleet.shared.parser import ALIASES, Parser
from lorafleet.shared.tables import part_text, print_list
from protocol.wire.errors import Unavailable

PATH, FLEET_PATH = "/v1/workers", "/v1/fleet"
COLUMNS = ("name", "state", "base", "running", "waiting", "slots", "kv", "pool", "resident", "host", "id")

run = run_action


def add_arguments(parser: Parser) -> None:
    """Declare the command's arguments on `parser`."""
    actions = parser.add_subparsers(metavar="list|drain|resume", required=True)
    listing = actions.add_parser("list", aliases=ALIASES, help="list workers, with state and load")
    listing.set_defaults(do=_list)
    for name, text in (
        ("drain", "let a worker finish its requests, and send it no new ones"),
        ("resume", "send a worker requests again"),
    ):
        order = actions.add_parser(name, help=text)
        which = order.add_mutually_exclusive_group(required=True)
        which.add_argument("name", metavar="NAME", nargs="?", default="", help="name or id of the worker")
        if name == "drain":
            text = "the worker that is cheapest to lose, chosen by the scheduler"
            which.add_argument("--least-valuable", action="store_true", help=text)
        order.add_argument(
            "--wait",
            type=float,
            default=5.0,
            metavar="SECONDS",
            help="seconds to wait for its confirmation (default: %(default)g)",
        )
        order.set_defaults(do=_order, order=name)
    for action in dict.fromkeys(actions.choices.values()):  # an action with an alias is listed twice
        add_json_flag(action)
        add_flags(action)


def _list(api: Api, args: argparse.Namespace) -> list[dict[str, Any]]:
    found = list(api.pages(PATH))
    if not args.json:
        print_list(*shown(COLUMNS, list(map(row, found)), found), "no workers")
    return found


def shown(
    columns: Sequence[str], rows: Sequence[Sequence[str]], workers: Sequence[dict[str, Any]]
) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of workers; the base is left out if all have the same."""
    several = len({worker["base"] for worker in workers if worker.get("base")}) > 1
    kept = [i for i, name in enumerate(columns) if several or name != "base"]
    return [columns[i] for i in kept], [[cells[i] for i in kept] for cells in rows]


def row(worker: dict[str, Any]) -> list[str]:
    """Return a worker's cells for `COLUMNS`."""
    if worker["state"] == "lost":
        return ["-", "lost", *["-"] * 8, worker["id"]]
    kv, pool, adapters = worker["kv"], worker["pool"], worker["adapters"]
    return [
        worker["name"], worker["state"], worker.get("base") or "-",
        str(worker["running"]), str(worker["waiting"]), str(worker["capacity"]),
        part_text(kv["blocks"] - kv["free"], kv["blocks"]), part_text(pool["bytes"] - pool["free"], pool["bytes"]),
        str(adapters["resident"]), str(adapters["host"]), worker["id"],
    ]  # fmt: skip


def _order(api: Api, args: argparse.Namespace) -> dict[str, Any]:
    name = args.name or api.ask("GET", FLEET_PATH)["drain_next"]
    if not name:
        raise Unavailable("the scheduler proposes no worker: none is ready, or no scheduler is active")
    path = f"{PATH}/{in_path(name)}/{args.order}"
    worker = api.ask("POST", path, params={"wait_s": args.wait}, timeout=args.wait + 60)
    if not args.json:
        print(f"{worker['name']} is {worker['state']}, {worker['running']} requests running")
    return worker
