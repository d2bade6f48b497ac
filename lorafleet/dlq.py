"""`lorafleet dlq` lists, shows and retries dead letters: requests that were given up."""

from __future__ import annotations

import argparse
from datetime import datetime
from typing import Any

from lorafleet.on_queue import add_flags, run_action
from lorafleet.tables import print_list
from protocol.queue.books.audit import from_command_line
from protocol.queue.bus import Bus
from protocol.runtime.settings import Settings
from protocol.wire import messages as m
from protocol.wire.letters import view


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    actions = parser.add_subparsers(metavar="list|show|retry", required=True)
    listing = actions.add_parser("list", help="list dead letters, newest first")
    listing.add_argument("--limit", type=int, default=50, help="maximum number listed (%(default)s)")
    show = actions.add_parser("show", help="show one in full: its request, and each worker failure while it ran")
    retry = actions.add_parser("retry", help="requeue requests, with attempts reset")
    show.add_argument("letter", metavar="ID")
    retry.add_argument("letters", metavar="ID", nargs="+")
    for action, do in ((listing, _list), (show, _show), (retry, _retry)):
        action.set_defaults(do=do)
        add_flags(action, "request_timeout_s")


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code. Raises NotFound, Conflict, Unavailable."""
    return run_action(args)


async def _list(bus: Bus, _: Settings, args: argparse.Namespace) -> list[dict[str, Any]]:
    found = await bus.dead_letters.newest(args.limit)
    if not args.json:
        columns = ("id", "when", "request", "adapter", "tokens", "deaths", "why")
        print_list(columns, [_row(*one) for one in found], "no dead letters")
    return [view(*one) for one in found]


def _row(letter_id: str, letter: m.DeadLetter) -> list[str]:
    sub = letter.submit
    rid, digest = (sub.rid, sub.digest[:12] or "base") if sub else ("", letter.stream)
    num_tokens, num_deaths = str(letter.num_output_tokens), str(len(letter.deaths))
    return [letter_id, _time(letter.ms), rid, digest, num_tokens, num_deaths, letter.reason]


async def _show(bus: Bus, _: Settings, args: argparse.Namespace) -> dict[str, Any]:
    letter = await bus.dead_letters.get(args.letter)
    if not args.json:
        _print_letter(args.letter, letter)
    return view(args.letter, letter)


def _print_letter(letter_id: str, letter: m.DeadLetter) -> None:
    lines = [f"{letter_id}  {_time(letter.ms)}", f"why       {letter.reason}"]
    if letter.stream:
        lines += [f"stream    {letter.stream}", f"message   {letter.raw[:400]!r}"]
    if sub := letter.submit:
        lines += [
            f"request   {sub.rid} of {sub.tenant}, {sub.cls}, submitted {_time(sub.submitted_ms)}",
            f"adapter   {sub.digest or 'none (the base model)'}",
            f"tokens    {sub.num_prompt_tokens} in the prompt, {letter.num_output_tokens} of at most "
            f"{sub.max_new_tokens} generated",
            f"attempts  {letter.attempts} without progress, {len(letter.deaths)} in all",
        ]
    print("\n".join([*lines, *(_death_line(death) for death in letter.deaths)]))


async def _retry(bus: Bus, settings: Settings, args: argparse.Namespace) -> list[dict[str, Any]]:
    queued: list[dict[str, Any]] = []
    for letter_id in args.letters:
        rid = await bus.dead_letters.retry(letter_id, settings.request_timeout_s)
        await bus.audit.note(from_command_line("dead_letter.retry", letter_id, rid))
        queued.append({"id": letter_id, "request": rid})
        if not args.json:
            print(f"{letter_id}: {rid} was requeued")
    return queued


def _death_line(death: m.Death) -> str:
    after_s = max(0, death.ms - death.assigned_ms) / 1000
    done = f"{death.num_output_tokens} tokens" if death.phase == "decode" else "before its first token"
    who = f"{death.name or '?'} ({death.wid})"
    return f"  {_time(death.ms)}  {who} in {death.phase}, {done}, {after_s:.1f} s after the assignment"


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000).isoformat(" ", "milliseconds") if ms else "-"
