"""`lorafleet adapters` lists the adapters of a running fleet, and adds, moves and removes them."""

from __future__ import annotations

import argparse
import importlib
from itertools import islice
from pathlib import Path
from typing import Any

from lorafleet.shared.api import Api, add_flags, add_json_flag, in_path, run_action
from lorafleet.shared.parser import ALIASES, Parser, number
from lorafleet.shared.tables import print_list, size_text
from protocol.runtime.imports import importing

PATH = "/v1/adapters"
PAGE = 1000
ORDERS = {
    "pin": "keep an adapter in every worker's memory",
    "unpin": "allow an adapter to be evicted again",
    "preload": "load an adapter on every worker",
    "evict": "free an adapter's memory in all workers; it stays served",
}


def add_arguments(parser: Parser) -> None:
    """Declare the command's arguments on `parser`."""
    actions = parser.add_subparsers(
        metavar="list|add|pin|unpin|preload|evict|refresh|remove|check|convert", required=True
    )
    listing = actions.add_parser("list", aliases=ALIASES, help="list adapters by name, with state and location")
    listing.add_argument("--limit", type=number, default=100, help="maximum number listed (default: %(default)s)")
    listing.set_defaults(do=_list)
    add = actions.add_parser("add", help="serve an adapter under a name")
    add.add_argument("name", metavar="NAME", help="name of the adapter in the API")
    add.add_argument(
        "source",
        metavar="SOURCE",
        nargs="?",
        default="",
        help="its source: local:FOLDER, ORG/NAME[@REVISION], s3://BUCKET/PREFIX (default: NAME)",
    )
    add.add_argument("--replace", action="store_true", help="replace an adapter with this name from another source")
    add.add_argument("--pin", action="store_true", help="also pin it in every worker's memory")
    add.add_argument("--preload", action="store_true", help="also load it on every worker")
    add.add_argument(
        "--base", default="", help="base model to serve it with (default: the one it names, or the only one it fits)"
    )
    add.set_defaults(do=_add)
    found = [listing, add]
    for name, text in ORDERS.items():
        order = actions.add_parser(name, help=text)
        order.set_defaults(do=_order, order=name)
        found.append(order)
    refresh = actions.add_parser("refresh", help="check an adapter's source for changes, and serve the latest version")
    refresh.set_defaults(do=_refresh)
    remove = actions.add_parser("remove", help="stop serving an adapter, and free its memory")
    remove.add_argument(
        "--force", action="store_true", help="fail the requests that use it instead of waiting for them"
    )
    remove.add_argument("--blob", action="store_true", help="also delete it from the stores' disks")
    remove.set_defaults(do=_remove)
    found += [refresh, remove]
    for action in found[2:]:
        action.add_argument("adapter", metavar="NAME", help="name of the adapter")
    for action in found[1:]:
        action.add_argument(
            "--wait",
            type=float,
            default=30.0,
            metavar="SECONDS",
            help="seconds to wait until it is done (default: %(default)g)",
        )
    for action in found:
        action.add_argument("--tenant", help="owner of the name; needs an admin key (default: shared by all tenants)")
        add_json_flag(action)
        add_flags(action)
    _add_offline(actions)


def _add_offline(actions: Any) -> None:
    """Declare the actions on local folders, which need no fleet."""
    check = actions.add_parser("check", help="show what an adapter changes, or why it is refused; needs no fleet")
    check.description = (
        "Print what an adapter changes, and how its module names are mapped. Exit code: 0 if it can be served and has"
        " an effect, 1 if it is refused or has no effect, 2 for wrong usage."
    )
    check.add_argument("folder", metavar="DIR", type=Path, help="folder of a PEFT, MLX-LM or llama.cpp adapter")
    conversion = actions.add_parser(
        "convert", help="convert an adapter of MLX-LM, llama.cpp or another type to LoRA; needs no fleet"
    )
    conversion.add_argument("folder", metavar="SRC", type=Path, help="folder of the adapter; it is not changed")
    conversion.add_argument("target", metavar="DST", type=Path, help="folder to write; it must not exist")
    conversion.add_argument(
        "--rank",
        choices=("auto",),
        default="",
        help="approximate a full-rank adapter by LoRA, at the lowest rank that preserves --keep of its norm",
    )
    conversion.add_argument(
        "--keep",
        type=float,
        default=0.999,
        help="fraction of each layer's Frobenius norm that --rank auto preserves (default: %(default)s)",
    )
    for name, action in (("check", check), ("convert", conversion)):
        action.set_defaults(offline=name)
        action.add_argument(
            "--base",
            metavar="MODEL",
            default="",
            help="base model: a Hub id or a folder; required for GGUF and for adapter types other than LoRA",
        )


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code. Raises the fleet's error response, and Unavailable."""
    if "offline" in args:
        with importing():
            offline = importlib.import_module("adapter_store.command")  # takes longer to import than all other actions
        return offline.run(args)
    return run_action(args)


def _list(api: Api, args: argparse.Namespace) -> list[dict[str, Any]]:
    found = list(islice(api.pages(PATH, limit=min(args.limit, PAGE), **_of(args)), args.limit))
    if not args.json:
        columns = ("name", "state", "rank", "size", "pinned", "hits", "misses", "source", "")
        print_list(columns, list(map(_row, found)), "no adapters")
    return found


def _row(adapter: dict[str, Any]) -> list[str]:
    use = adapter["use"] or {}
    return [
        adapter["name"], adapter["state"], _shown(adapter["rank"]), size_text(adapter["bytes"]),
        _shown(adapter["pinned"]), _shown(use.get("hits")), _shown(use.get("misses")), _shown(adapter["source"]),
        adapter["reason"] or adapter["warning"] or "",
    ]  # fmt: skip


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)


def _add(api: Api, args: argparse.Namespace) -> dict[str, Any]:
    body = {"name": args.name, "source": args.source, "replace": args.replace, "pin": args.pin,
            "preload": args.preload, "base": args.base, "wait_s": args.wait, **_of(args)}  # fmt: skip
    return _printed(args, api.ask("POST", PATH, json=body, timeout=args.wait + 60))


def _order(api: Api, args: argparse.Namespace) -> dict[str, Any]:
    params = {} if args.order == "unpin" else {"wait_s": args.wait}
    if args.order == "preload":
        params |= _of(args)
    answer = api.request("POST", f"{PATH}/{in_path(args.adapter)}/{args.order}", params=params, timeout=args.wait + 60)
    result = answer.json()
    if not args.json:
        later = "; still in progress" if answer.status_code == 202 else ""
        done = f": {_freed(result)}" if "freed" in result else f" is {result['state']}"
        print(f"{args.adapter}{done}{later}")
    return result


def _refresh(api: Api, args: argparse.Namespace) -> dict[str, Any]:
    known = api.ask("GET", f"{PATH}/{in_path(args.adapter)}", params=_of(args))
    body = {"name": args.adapter, "source": known["source"] or "", "wait_s": args.wait, **_of(args)}
    return _printed(args, api.ask("POST", PATH, json=body, timeout=args.wait + 60))


def _remove(api: Api, args: argparse.Namespace) -> dict[str, Any]:
    params = {"force": args.force, "blob": args.blob, "wait_s": args.wait, **_of(args)}
    result = api.ask("DELETE", f"{PATH}/{in_path(args.adapter)}", params=params, timeout=args.wait + 60)
    if not args.json:
        kept = f"; its content is still used by {', '.join(result['kept_by'])}" if result["kept_by"] else ""
        print(f"{args.adapter} is no longer served, {_freed(result)}{kept}")
    return result


def _printed(args: argparse.Namespace, adapter: dict[str, Any]) -> dict[str, Any]:
    if not args.json:
        why = adapter["reason"] or adapter["warning"]
        print(f"{adapter['name']} is {adapter['state']}" + (f": {why}" if why else ""))
    return adapter


def _freed(result: dict[str, Any]) -> str:
    freed = result["freed"]
    pool, host = size_text(freed["pool_bytes"]), size_text(freed["host_bytes"])
    waiting = f"; the rest is freed when requests end on {', '.join(result['waiting'])}" if result["waiting"] else ""
    return f"freed {pool} of pool memory, {host} of host memory{waiting}"


def _of(args: argparse.Namespace) -> dict[str, str]:
    return {"tenant": args.tenant} if args.tenant is not None else {}
