"""`lorafleet dlq` lists, shows and retries dead letters: by the gateway, or on the queue itself where it is named."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from datetime import datetime
from itertools import islice
from typing import Any

from lorafleet import api, on_queue
from lorafleet.api import URL_VARIABLE, Api
from lorafleet.flags import PREFIX
from lorafleet.parser import ALIASES, Parser
from lorafleet.tables import print_list
from protocol.queue.books.audit import from_command_line
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings
from protocol.wire.letters import view

PATH = "/v1/dead_letters"
PAGE = 100


def add_arguments(parser: Parser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.epilog = "The gateway is asked, or with --redis-url or --data the queue itself, while no gateway runs."
    actions = parser.add_subparsers(metavar="list|show|retry", required=True)
    listing = actions.add_parser("list", aliases=ALIASES, help="list dead letters, newest first")
    listing.add_argument("--limit", type=int, default=50, help="maximum number listed (%(default)s)")
    show = actions.add_parser("show", help="show one with its request, and each worker failure while it ran")
    retry = actions.add_parser("retry", help="requeue requests, with attempts reset")
    show.add_argument("letter", metavar="ID")
    retry.add_argument("letters", metavar="ID", nargs="+")
    for action, do, on_the_queue in (
        (listing, _list, _list_on_queue), (show, _show, _show_on_queue), (retry, _retry, _retry_on_queue),
    ):  # fmt: skip
        action.set_defaults(by_gateway=do, on_the_queue=on_the_queue)
        on_queue.add_flags(action, "request_timeout_s")
        api.add_flags(action)


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code. Raises NotFound, Conflict, Unavailable."""
    if names_queue(args, os.environ):
        args.do = args.on_the_queue
        return on_queue.run_action(args)
    args.do = args.by_gateway
    return api.run_action(args)


def names_queue(args: argparse.Namespace, variables: Mapping[str, str]) -> bool:
    """Return whether the queue is named, and no gateway by what stands before it: flags before variables. Pure."""
    if args.url or args.profile:
        return False
    if {"redis_url", "data"} & vars(args).keys():
        return True
    if variables.get(URL_VARIABLE):
        return False
    return bool({"REDIS_URL", f"{PREFIX}REDIS_URL", f"{PREFIX}DATA"} & variables.keys())


def _list(gateway: Api, args: argparse.Namespace) -> list[dict[str, Any]]:
    found = islice(gateway.pages(PATH, limit=min(args.limit, PAGE)), args.limit)
    return _listed(list(found), args)


async def _list_on_queue(bus: Bus, _: Settings, args: argparse.Namespace) -> list[dict[str, Any]]:
    return _listed([view(*one) for one in await bus.dead_letters.newest(args.limit)], args)


def _listed(found: list[dict[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    if not args.json:
        columns = ("id", "time", "request", "adapter", "tokens", "worker failures", "reason")
        print_list(columns, list(map(_row, found)), "no dead letters")
    return found


def _row(letter: dict[str, Any]) -> list[str]:
    request = letter["request"]
    adapter = (request["digest"] or "base")[:12] if request else letter["stream"] or ""
    num_tokens = request["output_tokens"] if request else 0
    return [
        letter["id"], _time(letter["created_ms"]), request["id"] if request else "", adapter, str(num_tokens),
        str(len(letter["deaths"])), letter["reason"],
    ]  # fmt: skip


def _show(gateway: Api, args: argparse.Namespace) -> dict[str, Any]:
    return _shown(gateway.ask("GET", f"{PATH}/{api.in_path(args.letter)}"), args)


async def _show_on_queue(bus: Bus, _: Settings, args: argparse.Namespace) -> dict[str, Any]:
    return _shown(view(args.letter, await bus.dead_letters.get(args.letter)), args)


def _shown(letter: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
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


def _retry(gateway: Api, args: argparse.Namespace) -> list[dict[str, Any]]:
    queued: list[dict[str, Any]] = []
    for letter_id in args.letters:
        answer = gateway.ask("POST", f"{PATH}/{api.in_path(letter_id)}/retry")
        queued.append(_requeued(letter_id, answer["request"], args))
    return queued


async def _retry_on_queue(bus: Bus, settings: Settings, args: argparse.Namespace) -> list[dict[str, Any]]:
    queued: list[dict[str, Any]] = []
    for letter_id in args.letters:
        rid = await bus.dead_letters.retry(letter_id, settings.request_timeout_s)
        await bus.audit.note(from_command_line("dead_letter.retry", letter_id, rid))
        queued.append(_requeued(letter_id, rid, args))
    return queued


def _requeued(letter_id: str, rid: str, args: argparse.Namespace) -> dict[str, Any]:
    if not args.json:
        print(f"{letter_id}: {rid} was requeued")
    return {"id": letter_id, "request": rid}


def _failure_line(failure: dict[str, Any]) -> str:
    num = failure["output_tokens"]
    done = f"{num} tokens" if failure["phase"] == "decode" else "before its first token"
    who = f"{failure['worker'] or '?'} ({failure['wid']})"
    after_s = failure["after_ms"] / 1000
    return f"  {_time(failure['ms'])}  {who} in {failure['phase']}, {done}, {after_s:.1f} s after the assignment"


def _time(ms: int | None) -> str:
    return datetime.fromtimestamp(ms / 1000).isoformat(" ", "milliseconds") if ms else "-"
