"""`lorafleet dlq` lists, shows and retries dead letters."""

from __future__ import annotations

import argparse
from datetime import datetime
from itertools import islice
from typing import Any

from lorafleet.shared.api import Api, add_flags, add_json_flag, in_path, run_action
from lorafleet.shared.parser import ALIASES, Parser, number
from lorafleet.shared.tables import print_list

PATH = "/v1/dead_letters"
PAGE = 100

run = run_action


def add_arguments(parser: Parser) -> None:
    """Declare the command's arguments on `parser`."""
    actions = parser.add_subparsers(metavar="list|show|retry", required=True)
    listing = actions.add_parser("list", aliases=ALIASES, help="list dead letters, newest first")
    listing.add_argument("--limit", type=number, default=50, help="maximum number listed (default: %(default)s)")
    show = actions.add_parser("show", help="show one with its request, and each worker failure while it ran")
    retry = actions.add_parser("retry", help="requeue requests, with attempts reset")
    show.add_argument("letter", metavar="ID", help="id of the dead letter")
    retry.add_argument("letters", metavar="ID", nargs="+", help="ids of dead letters")
    for action, do in ((listing, _list), (show, _show), (retry, _retry)):
        action.set_defaults(do=do)
        add_json_flag(action)
        add_flags(action)


def _list(api: Api, args: argparse.Namespace) -> list[dict[str, Any]]:
    found = list(islice(api.pages(PATH, limit=min(args.limit, PAGE)), args.limit))
    if not args.json:
        columns = ("id", "time", "request", "adapter", "tokens", "worker failures", "reason")
        print_list(columns, list(map(_row, found)), "no dead letters")
    return found


def _row(letter: dict[str, Any]) -> list[str]:
    request = letter["request"]
    adapter = (request["digest"] or "base")[:12] if request else letter["stream"] or ""
    num_tokens = request["output_tokens"] if request else 0
    return [
        letter["id"],
        _time(letter["created_ms"]),
        request["id"] if request else "",
        adapter,
        str(num_tokens),
        str(len(letter["deaths"])),
        letter["reason"],
    ]


def _show(api: Api, args: argparse.Namespace) -> dict[str, Any]:
    letter = api.ask("GET", f"{PATH}/{in_path(args.letter)}")
    if not args.json:
        print("\n".join(_lines(letter)))
    return letter


def _lines(letter: dict[str, Any]) -> list[str]:
    lines = [f"{letter['id']}  {_time(letter['created_ms'])}", f"reason    {letter['reason']}"]
    if letter["stream"]:
        lines += [f"stream    {letter['stream']}", f"message   {letter['raw']}"]
    if request := letter["request"]:
        lines += [
            f"request   {request['id']} of {request['tenant']}, {request['class']},"
            f" submitted {_time(request['submitted_ms'])}",
            f"adapter   {request['digest'] or 'none (the base model)'}",
            f"tokens    {request['prompt_tokens']} in the prompt, {request['output_tokens']} of at most "
            f"{request['max_tokens']} generated",
            f"attempts  {letter['attempts']} without progress, {len(letter['deaths'])} in all",
        ]
    return [*lines, *(_failure_line(failure) for failure in letter["deaths"])]


def _retry(api: Api, args: argparse.Namespace) -> list[dict[str, Any]]:
    queued: list[dict[str, Any]] = []
    for letter_id in args.letters:
        request = api.ask("POST", f"{PATH}/{in_path(letter_id)}/retry")["request"]
        if not args.json:
            print(f"{letter_id}: {request} was requeued")
        queued.append({"id": letter_id, "request": request})
    return queued


def _failure_line(failure: dict[str, Any]) -> str:
    num = failure["output_tokens"]
    done = f"{num} tokens" if failure["phase"] == "decode" else "before its first token"
    who = f"{failure['worker'] or '?'} ({failure['wid']})"
    after_s = failure["after_ms"] / 1000
    return f"  {_time(failure['ms'])}  {who} in {failure['phase']}, {done}, {after_s:.1f} s after the assignment"


def _time(ms: int | None) -> str:
    return datetime.fromtimestamp(ms / 1000).isoformat(" ", "milliseconds") if ms else "-"
