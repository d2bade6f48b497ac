"""`lorafleet bases` lists, adds and removes base models of a running fleet."""

from __future__ import annotations

import argparse
from typing import Any

from lorafleet.shared.api import Api, add_flags, add_json_flag, in_path, run_action
from lorafleet.shared.parser import ALIASES, Parser
from lorafleet.shared.tables import print_list

PATH = "/v1/bases"

run = run_action


def add_arguments(parser: Parser) -> None:
    """Declare the command's arguments on `parser`."""
    actions = parser.add_subparsers(metavar="list|add|remove", required=True)
    actions.add_parser("list", aliases=ALIASES, help="list bases, with their state").set_defaults(do=_list)
    add = actions.add_parser("add", help="add a base; start its worker with `lorafleet serve worker`")
    add.add_argument("model", metavar="MODEL", help="a Hub id, or the absolute path of a folder, as services see it")
    add.add_argument("--name", default="", help="its name in the API (default: the Hub id, or the folder's name)")
    add.set_defaults(do=_add)
    remove = actions.add_parser("remove", help="refuse a base's calls, fail its queued requests, and drain its workers")
    remove.add_argument("name", metavar="NAME", help="name of the base in the API")
    remove.set_defaults(do=_remove)
    for action in dict.fromkeys(actions.choices.values()):  # an action with an alias is listed twice
        add_json_flag(action)
        add_flags(action)


def _list(api: Api, args: argparse.Namespace) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = api.ask("GET", PATH)["data"]
    if not args.json:
        rows = [
            [one["id"], one["state"], one["model"], "yes" if one["added"] else "no", one["reason"] or ""]
            for one in found
        ]
        print_list(("name", "state", "model", "added", ""), rows, "no bases")
    return found


def _add(api: Api, args: argparse.Namespace) -> dict[str, Any]:
    base = api.ask("POST", PATH, json={"model": args.model, "name": args.name})
    if not args.json:
        named = f" --served-name {args.name}" if args.name else ""
        print(f"{base['id']} was added; `lorafleet bases list` shows its state")
        print(f"to give it a worker: lorafleet serve worker --model {base['model']}{named}")
    return base


def _remove(api: Api, args: argparse.Namespace) -> dict[str, Any]:
    gone = api.ask("DELETE", f"{PATH}/{in_path(args.name)}")
    if not args.json:
        print(f"{gone['id']} is no longer served; stop its workers once they have drained")
    return gone
