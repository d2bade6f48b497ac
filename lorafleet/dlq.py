"""`lorafleet dlq` lists, shows and retries dead letters: requests that were given up."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime

from lorafleet.flags import add_settings, load_settings
from lorafleet.launcher.embedded import with_queue
from lorafleet.tables import print_list
from protocol.queue.audit import from_command_line
from protocol.queue.bus import CONNECTION_ERRORS, Bus, QueueError
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.errors import PermissionDenied, Unavailable

FLAGS = ("redis_url", "redis_password_file", "data", "request_timeout_s")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    actions = parser.add_subparsers(metavar="list|show|retry", required=True)
    listing = actions.add_parser("list", help="list dead letters, the newest first")
    listing.add_argument("--limit", type=int, default=50, help="most that are listed (%(default)s)")
    show = actions.add_parser("show", help="show one in full: its request, and each worker that died while running it")
    retry = actions.add_parser("retry", help="queue requests again, with no attempts counted")
    show.add_argument("letter", metavar="ID")
    retry.add_argument("letters", metavar="ID", nargs="+")
    for action, do in ((listing, _list), (show, _show), (retry, _retry)):
        action.set_defaults(do=do)
        add_settings(action, first=FLAGS, skip=tuple(Settings.model_fields))


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code. Raises NotFound, Conflict, Unavailable."""
    return asyncio.run(_with_letters(with_queue(load_settings(args)), args))


async def _with_letters(settings: Settings, args: argparse.Namespace) -> int:
    do: Callable[[Bus, Settings, argparse.Namespace], Awaitable[None]] = args.do
    bus = Bus(settings.queue_url())
    try:
        await do(bus, settings, args)
    except CONNECTION_ERRORS as error:
        raise Unavailable(f"no queue answers at {settings.redis_url}: {error}") from error
    except QueueError as error:
        raise PermissionDenied(f"the queue refuses: {error}") from error
    finally:
        await bus.close()
    return 0


async def _list(bus: Bus, _: Settings, args: argparse.Namespace) -> None:
    rows: list[list[str]] = []
    for letter_id, letter in await bus.dead_letters.newest(args.limit):
        sub = letter.submit
        rid, digest = (sub.rid, sub.digest[:12] or "base") if sub else ("", letter.stream)
        num_tokens, num_deaths = str(letter.num_output_tokens), str(len(letter.deaths))
        rows.append([letter_id, _time(letter.ms), rid, digest, num_tokens, num_deaths, letter.reason])
    print_list(("id", "when", "request", "adapter", "tokens", "deaths", "why"), rows, "no dead letters")


async def _show(bus: Bus, _: Settings, args: argparse.Namespace) -> None:
    letter = await bus.dead_letters.get(args.letter)
    lines = [f"{args.letter}  {_time(letter.ms)}", f"why       {letter.reason}"]
    if letter.stream:
        lines += [f"stream    {letter.stream}", f"message   {letter.raw[:400]!r}"]
    if sub := letter.submit:
        lines += [
            f"request   {sub.rid} of {sub.tenant}, {sub.cls}, submitted {_time(sub.submitted_ms)}",
            f"adapter   {sub.digest or 'none (the base model)'}",
            f"tokens    {sub.num_prompt_tokens} in the prompt, {letter.num_output_tokens} of at most "
            f"{sub.max_new_tokens} made",
            f"attempts  {letter.attempts} without progress, {len(letter.deaths)} in all",
        ]
    print("\n".join([*lines, *(_told(death) for death in letter.deaths)]))


async def _retry(bus: Bus, settings: Settings, args: argparse.Namespace) -> None:
    for letter_id in args.letters:
        rid = await bus.dead_letters.retry(letter_id, settings.request_timeout_s)
        await bus.audit.note(from_command_line("dead_letter.retry", letter_id, rid))
        print(f"{letter_id}: {rid} is queued again")


def _told(death: m.Death) -> str:
    after_s = max(0, death.ms - death.assigned_ms) / 1000
    done = f"{death.num_output_tokens} tokens" if death.phase == "decode" else "before a token of its own"
    who = f"{death.name or '?'} ({death.wid})"
    return f"  {_time(death.ms)}  {who} in {death.phase}, {done}, {after_s:.1f} s after it got it"


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000).isoformat(" ", "milliseconds") if ms else "-"
