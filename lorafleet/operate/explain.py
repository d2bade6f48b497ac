"""`lorafleet explain` shows the timeline of a request; `--replay` runs it again and compares the tokens."""

from __future__ import annotations

import argparse
from typing import Any

from lorafleet.shared.api import Api, add_flags, print_json
from lorafleet.shared.parser import Parser
from lorafleet.shared.tables import print_list, printable


def add_arguments(parser: Parser) -> None:
    """Declare the command's arguments on `parser`."""
    parser.add_argument("request", metavar="ID", help="id of a completion or request; ID-2 is its third choice")
    parser.add_argument("--replay", action="store_true", help="replay it now, and compare token by token")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code: 1 if a replay differs. Raises the fleet's error, and Unavailable."""
    with Api(args) as api:
        request = api.ask("GET", f"/v1/requests/{args.request}")
        compared = api.ask("POST", f"/v1/requests/{args.request}/replay") if args.replay else None
    if args.json:
        print_json(request | ({"replay": compared} if compared else {}))
    else:
        _print(request)
        if compared:
            print(_of_replay(compared))
    return 0 if compared is None or compared["equal"] else 1


def _print(request: dict[str, Any]) -> None:
    adapter = request["adapter"] or {}
    who = adapter.get("name") or adapter.get("digest", "")[:12] or "the base model"
    base = f" ({request['base']})" if request.get("base") else ""
    print(
        f"{request['id']}: {request['state']}, {who}{base}, {request['prompt_tokens']} prompt tokens"
        f" ({request['cached_tokens']} cached), {request['output_tokens']} output tokens\n"
    )
    if converted := adapter.get("converted"):
        layer, error = next(iter(converted["errors"].items()), ("", 0.0))
        kind, where = converted["peft_type"], f", at {layer}" if layer else ""
        print(f"the adapter approximates {kind} by LoRA: at most {error:.2g} of a layer's norm off{where}\n")
    events = request["timeline"]
    start_ms = events[0]["ms"]
    rows = [[f"+{event['ms'] - start_ms} ms", event["event"], event["text"]] for event in events]
    print_list(("time", "event", "details"), rows, "no events are recorded")
    if request["error"]:
        print(f"\n{request['error']['code']}: {request['error']['message']}")
    if request.get("text"):
        _print_text(request["text"])


def _print_text(text: dict[str, Any]) -> None:
    if text["problem"]:
        print(f"\nprompt and output are not available: {text['problem']}")
        return
    cut = " (cut)" if text["is_cut"] else ""
    print(f"\nprompt{cut}:\n{printable(text['prompt'])}")
    if text["output"] is not None:
        print(f"\noutput{cut}:\n{printable(text['output'])}")


def _of_replay(compared: dict[str, Any]) -> str:
    if compared["equal"]:
        return f"\nreplayed as {compared['replay']}: the same {compared['tokens']} tokens"
    return (
        f"\nreplayed as {compared['replay']}: differs from token {compared['first_difference']} on"
        f" ({compared['tokens']} tokens then, {compared['tokens_now']} now)\n"
        f"  then: {compared['before']}\n  now:  {compared['now']}"
    )
