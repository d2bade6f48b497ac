"""`lorafleet dlq` lists, shows and retries dead letters: by the gateway, or on the queue itself where it is named."""

from __future__ import annotations

import argparse
import os
from datetime import datetime
from itertools import islice
from typing import Any

from lorafleet.launcher.records import URL_VARIABLE
from lorafleet.shared import api, on_queue
from lorafleet.shared.api import PROFILE_VARIABLE, Api
from lorafleet.shared.flags import load_settings
from lorafleet.shared.parser import ALIASES, Parser, number
from lorafleet.shared.tables import print_list
from protocol.queue.books.audit import from_command_line
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings
from protocol.wire.errors import BadRequest
from protocol.wire.letters import view

PATH = "/v1/dead_letters"
PAGE = 100
GATEWAY_FLAGS = ("url", "profile", "key", "api_key_file")
QUEUE_FLAGS = (*on_queue.FLAGS, "request_timeout_s", "config")


def add_arguments(parser: Parser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.epilog = "Reads from the gateway, or from the queue itself if the settings redis_url or data are given."
    actions = parser.add_subparsers(metavar="list|show|retry", required=True)
    listing = actions.add_parser("list", aliases=ALIASES, help="list dead letters, newest first")
    listing.add_argument("--limit", type=number, default=50, help="maximum number listed (%(default)s)")
    show = actions.add_parser("show", help="show one with its request, and each worker failure while it ran")
    retry = actions.add_parser("retry", help="requeue requests, with attempts reset")
    show.add_argument("letter", metavar="ID")
    retry.add_argument("letters", metavar="ID", nargs="+")
    for action, do, on_the_queue, settings in (
        (listing, _list, _list_on_queue, ()),
        (show, _show, _show_on_queue, ()),
        (retry, _retry, _retry_on_queue, ("request_timeout_s",)),
    ):
        on_queue.add_flags(action, *settings)
        api.add_flags(action)
        action.set_defaults(by_gateway=do, on_the_queue=on_the_queue, profile="")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code. Raises BadRequest, NotFound, Conflict, Unavailable."""
    if _asks_queue(args):
        args.do = args.on_the_queue
        return on_queue.run_action(args)
    args.do = args.by_gateway
    args.profile = args.profile or os.environ.get(PROFILE_VARIABLE, "")
    return api.run_action(args)


def _asks_queue(args: argparse.Namespace) -> bool:
    """Return whether the queue is named, and no gateway by what stands before it: flags before variables.

    Raises BadRequest for wrong settings, and for a flag that whoever is asked would ignore.
    """
    given = {name for name, value in vars(args).items() if value != args.parser.get_default(name)}
    gateway, queue = (
        [f"--{name.replace('_', '-')}" for name in names if name in given] for names in (GATEWAY_FLAGS, QUEUE_FLAGS)
    )
    if gateway and queue:
        raise BadRequest(
            f"{gateway[0]} and {queue[0]} cannot be used together: one is for the gateway, one for the queue"
        )
    if gateway or (not queue and (os.environ.get(URL_VARIABLE) or os.environ.get(PROFILE_VARIABLE))):
        return False
    is_named = bool({"redis_url", "data"} & load_settings(args).model_fields_set)
    if queue and not is_named:
        raise BadRequest(f"{queue[0]} is for the queue, which nothing names: give --redis-url or --data as well")
    return is_named


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
        letter["id"],
        _time(letter["created_ms"]),
        request["id"] if request else "",
        adapter,
        str(num_tokens),
        str(len(letter["deaths"])),
        letter["reason"],
    ]


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
