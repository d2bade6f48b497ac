"""`lorafleet status` shows the fleets of this machine, or the one at a URL: whether each responds, and its load."""

from __future__ import annotations

import argparse
import os
from typing import Any

from lorafleet.launcher import records
from lorafleet.shared.api import Api, add_flags, add_json_flag, print_json
from lorafleet.shared.parser import Parser
from lorafleet.shared.tables import print_list
from protocol.wire.errors import LorafleetError


def add_arguments(parser: Parser) -> None:
    """Declare the command's arguments on `parser`."""
    add_json_flag(parser)
    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code: 0 if all fleets are ready, else 1. Raises BadRequest."""
    is_named = args.url or os.environ.get(records.URL_VARIABLE) or args.profile
    fleets = [None] if is_named else records.running()
    found = [_of(args, fleet) for fleet in fleets]
    if args.json:
        print_json(found)
    elif not found:
        print(records.NO_FLEET)
    else:
        columns = ("url", "state", "model", "workers", "queued", "running", "up", "pid", "data", "logs")
        cells = [one | {"model": ", ".join(one["bases"] or ()) or one["model"]} for one in found]
        rows = [[str(one[name] if one[name] is not None else "-") for name in columns] for one in cells]
        print_list(columns, rows, records.NO_FLEET)
        for one in found:
            if one["error"]:
                print(f"{one['url']}: {one['error']}")
    return 0 if found and all(one["state"] == "ready" for one in found) else 1


def _of(args: argparse.Namespace, fleet: records.LocalFleet | None) -> dict[str, Any]:
    """Return the known facts about a fleet. None: the fleet that the flags name."""
    found: dict[str, Any] = dict.fromkeys(
        ("state", "model", "bases", "workers", "queued", "running", "up", "pid", "data", "logs", "error")
    )
    with Api(args, fleet) as api:
        found["url"] = api.url
        if (local := fleet or records.at(api.url)) is not None:
            facts = {"up": records.age_text(local), "pid": local.pid, "data": local.data, "logs": local.logs}
            found |= {"model": local.model, **facts}
        try:
            health = api.health()
            found |= {"state": health["status"], "workers": health["workers"]}
            state = api.ask("GET", "/v1/fleet")
            found |= {name: state[name] for name in ("queued", "running")}
            found["model"] = state["model"] or found["model"]
            found["bases"] = [base["name"] for base in state["bases"]] if "bases" in state else None
        except LorafleetError as error:
            found["state"] = found["state"] or "unreachable"
            found["error"] = error.message
    return found
