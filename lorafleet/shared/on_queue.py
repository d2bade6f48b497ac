"""Commands that access the queue directly, such as `lorafleet keys`. They need no running gateway."""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from lorafleet.launcher.embedded import with_queue
from lorafleet.launcher.records import URL_VARIABLE, at, is_here, the_only
from lorafleet.shared.api import add_json_flag, print_json
from lorafleet.shared.flags import add_settings, load_settings
from lorafleet.shared.parser import Parser
from protocol.queue.bus import CONNECTION_ERRORS, Bus, QueueError
from protocol.runtime.settings import Settings
from protocol.wire.brief import brief
from protocol.wire.errors import BadRequest, PermissionDenied, Unavailable

FLAGS = ("redis_url", "redis_password_file", "data")


def load_local_settings(args: argparse.Namespace, url: str | None = None) -> Settings:
    """Return the settings; if they name no queue or data folder, with the folder of the fleet on this machine.

    url: its gateway's, as given to the command, "" if it was not given; None for a command without that flag, for which
    LORAFLEET_URL may name a fleet of this machine. Raises BadRequest, also if several fleets could be meant.
    """
    settings = load_settings(args)
    if {"redis_url", "data"} & settings.model_fields_set:
        return settings
    if url is None and (named := os.environ.get(URL_VARIABLE)):
        fleet = at(named)
        if fleet is None:
            raise BadRequest(
                f"{URL_VARIABLE} is {brief(named)}, which no fleet of this machine has; name its queue: --redis-url"
            )
    elif url:
        fleet = at(url)
    else:
        fleet = the_only("--data" if url is None else "--url")
    return settings if fleet is None else settings.model_copy(update={"data": Path(fleet.data)})


def check_is_here(settings: Settings, url: str) -> None:
    """Raise BadRequest if no queue is named and the gateway at `url` ("": this machine's) is on another machine."""
    is_named = bool({"redis_url", "data"} & settings.model_fields_set)
    if url and not is_named and not is_here(url):
        raise BadRequest(f"{brief(url)} is another machine's, and no queue of it is on this machine")


def add_flags(parser: Parser, *more: str) -> None:
    """Declare the flags to reach the queue, the settings `more`, and `--json`."""
    add_json_flag(parser)
    add_settings(parser, first=(*FLAGS, *more), skip=tuple(Settings.model_fields))


def run_action(args: argparse.Namespace) -> int:
    """Run `args.do` with the queue; return the exit code. With `--json` its result is printed here.

    Raises as `args.do`, and Unavailable, PermissionDenied.
    """
    answer = asyncio.run(_done(with_queue(load_local_settings(args)), args))
    if args.json:
        print_json(answer)
    return 0


async def _done(settings: Settings, args: argparse.Namespace) -> Any:
    do: Callable[[Bus, Settings, argparse.Namespace], Awaitable[Any]] = args.do
    bus = Bus(settings.queue_url())
    try:
        return await do(bus, settings, args)
    except CONNECTION_ERRORS as error:
        raise Unavailable(f"cannot reach the queue at {settings.redis_url}: {error}") from error
    except QueueError as error:
        raise PermissionDenied(f"the queue refused: {error}") from error
    finally:
        await bus.close()
