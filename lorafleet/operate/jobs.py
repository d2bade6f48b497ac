"""`lorafleet jobs` lists, shows, follows and cancels background jobs."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from lorafleet.shared.api import Api, add_flags, add_json_flag, run_action
from lorafleet.shared.parser import ALIASES, Parser
from lorafleet.shared.tables import print_list
from protocol.wire.errors import Internal

run = run_action


def add_arguments(parser: Parser) -> None:
    """Declare the command's arguments on `parser`."""
    actions = parser.add_subparsers(metavar="list|show|tail|cancel", required=True)
    listing = actions.add_parser("list", aliases=ALIASES, help="list jobs, newest first")
    listing.add_argument("--limit", type=int, default=20, help="maximum number listed (default: %(default)s)")
    listing.add_argument("--status", help="filter by status: queued, running, completed, failed, cancelled or expired")
    listing.add_argument("--model", help="filter by model")
    listing.set_defaults(do=_list)
    show = actions.add_parser("show", help="show a job with its result, as JSON")
    show.set_defaults(do=_show, json=True)
    tail = actions.add_parser("tail", help="stream the text of a job, from its beginning to its end")
    tail.add_argument("--choice", type=int, default=0, help="index of the choice to print (default: %(default)s)")
    tail.set_defaults(do=_tail, json=False)
    cancel = actions.add_parser("cancel", help="cancel a job")
    cancel.set_defaults(do=_cancel)
    for action in (show, tail, cancel):
        action.add_argument("job", metavar="ID", help="id of the job, job_…")
    for action in (listing, cancel):
        add_json_flag(action)
    for action in (listing, show, tail, cancel):
        add_flags(action)


def _list(api: Api, args: argparse.Namespace) -> list[dict[str, Any]]:
    wanted = {"limit": args.limit, "status": args.status, "model": args.model}
    page = api.ask("GET", "/v1/jobs", params={name: value for name, value in wanted.items() if value is not None})
    if not args.json:
        columns = ("id", "status", "model", "endpoint", "output tokens", "worker failures")
        names = ("id", "status", "model", "endpoint", "tokens_generated", "attempts")
        print_list(columns, [[str(job[name]) for name in names] for job in page["data"]], "no jobs")
    return page["data"]


def _show(api: Api, args: argparse.Namespace) -> dict[str, Any]:
    return api.ask("GET", f"/v1/jobs/{args.job}")


def _tail(api: Api, args: argparse.Namespace) -> None:
    for event in api.events(f"/v1/jobs/{args.job}/stream"):
        if "error" in event:
            raise Internal(event["error"]["message"])
        for choice in event["choices"]:
            if choice["index"] == args.choice:
                sys.stdout.write(_text_of(choice))
                sys.stdout.flush()
    print()


def _cancel(api: Api, args: argparse.Namespace) -> dict[str, Any]:
    job = api.ask("POST", f"/v1/jobs/{args.job}/cancel")
    if not args.json:
        print(f"{job['id']} is {job['status']}")
    return job


def _text_of(choice: dict[str, Any]) -> str:
    """Return the new text of a choice in an event: of a completion, or of a chat with its reasoning and tool calls."""
    if "text" in choice:
        return choice["text"]
    delta = choice["delta"]
    calls = [call["function"] for call in delta.get("tool_calls") or ()]
    parts = (
        delta.get("reasoning_content"),
        delta.get("content"),
        *(call.get(name) for call in calls for name in ("name", "arguments")),
    )
    return "".join(part for part in parts if part)
